"""params.yaml: what is read, and one clear line for everything that is wrong with it."""

from pathlib import Path
from typing import Any

import pytest
from workspace import PARAMS, contents, params, write_params

from gram_core import tables
from gram_core.errors import GramError
from gram_core.evaluate.metrics import EvaluateConfig
from gram_core.sample.trajectory import SampleConfig
from pipelines.evaluate import evaluate
from pipelines.params import load_run, load_task, read_params, trials_file
from pipelines.profiles import compose, main, profiles
from pipelines.promote import promotion
from pipelines.report.sweeps import read_sweeps
from pipelines.sample import sample_run
from pipelines.train import Job, train_run

# What is wrong, and the words that the one line must have.
MALFORMED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "not yaml": ("runs: [unclosed", ("line", "not valid YAML")),
    "a tab": ("runs:\n\tgram: 1\n", ("line 2", "not valid YAML")),
    "a python object": ("runs: !!python/object:os.system {}\n", ("not valid YAML",)),
    "a key twice": ("tasks: {}\ntasks: {}\n", ("not valid YAML", "duplicate")),
    "not a mapping": ("- a\n- b\n", ("tasks", "runs")),
    "empty": ("", ("tasks", "runs")),
    "no runs": ({"tasks": PARAMS["tasks"]}, ("'runs'",)),
    "unknown section": ({**PARAMS, "sweep": {}}, ("'sweep'", "tasks, runs")),
    "a name with a slash": (params(runs={"a/b": {}}), ("'a/b'", "letters")),
    "run is no mapping": (params(runs__tiny=3), ("runs.tiny", "mapping")),
    "unknown run key": (params(runs__tiny__modle={}), ("runs.tiny.modle", "unknown key")),
    "unknown model key": (params(runs__tiny__model__dims=16), ("model.dims", "'dim'")),
    "no such task": (params(runs__tiny__task="sudoku"), ("runs.tiny.task", "queens")),
    "task is no name": (params(runs__tiny__task=3), ("runs.tiny.task", "name of a task")),
    "no such kind": (params(tasks__queens__kind="chess"), ("tasks.queens.kind", "nqueens")),
    "board too small": (params(tasks__queens__size=3), ("tasks.queens.size", ">= 4")),
    "board too large": (params(tasks__queens__size=16), ("tasks.queens.size", "<= 15")),
    "removes all queens": (params(tasks__queens__remove=[5]), ("tasks.queens", "remove", "1..4")),
    "removes none": (params(tasks__queens__remove=[]), ("tasks.queens", "remove")),
    "empty test split": (params(tasks__queens__split__test=0.0), ("split.test", "empty")),
    "split of another kind": (params(tasks__queens__split__by="luck"), ("split.by", "luck")),
    "text for a number": (params(runs__tiny__train__steps="many"), ("train.steps", "int")),
    "zero steps": (params(runs__tiny__train__steps=0), ("train.steps", ">= 1")),
    "negative rate": (params(runs__tiny__train__optim__lr=-1.0), ("train.optim.lr", "> 0")),
    "heads do not divide": (params(runs__tiny__model__heads=3), ("model", "multiple of 2 * heads")),
    "batch over workers": (
        params(runs__tiny__train__workers=3, runs__tiny__train__engine="deepspeed"),
        ("train", "multiple of workers"),
    ),
    "checkpoints between logs": (
        params(runs__tiny__train__checkpoint_every=3),
        ("checkpoint_every", "multiple of log_every"),
    ),
    "plain with workers": (params(runs__tiny__train__workers=2), ("plain", "workers: 1")),
    "heads without slots": (params(runs__tiny__train__prior_slots=0.0), ("prior_slots", "heads")),
    "heads and one slot": (params(runs__tiny__train__batch=1), ("prior_slots", "batch 1 leaves")),
    "Q-learning of one step": (
        params(runs__tiny__model__halting="q_learning", runs__tiny__model__N_sup=1),
        ("q_learning learns from the next", "use halt_only"),
    ),
    "Q-learning of no steps": (
        params(runs__tiny__model__halting="q_learning", runs__tiny__model__deep_supervision=False),
        ("q_learning learns from the next",),
    ),
    "a beginning of no growth": (params(runs__tiny__train__kl_from=0.5), ("kl_from", "kl_warmup")),
    "prior slots over workers": (
        params(
            runs__tiny__train__batch=16,
            runs__tiny__train__workers=4,
            runs__tiny__train__engine="deepspeed",
        ),
        ("runs.tiny.train", "slots that follow the prior", "fewer parts"),
    ),
    "kl under the prior": (params(runs__tiny__objective__kl="every"), ("kl: every", "rollout")),
    "width over what is drawn": (
        params(runs__tiny__evaluate__widths=[1, 9]),
        ("evaluate.widths", "sample.width"),
    ),
    "depth zero": (params(runs__tiny__sample__depth=0), ("sample.depth", ">= 1")),
}  # fmt: skip


def all_stages() -> None:
    """What the stages check of params.yaml, in their order."""
    load_task("queens").generate(Path)
    run = load_run("tiny")
    Job.of(run)
    run.section("sample", SampleConfig)
    run.section("evaluate", EvaluateConfig)
    evaluate(run)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_params_give_one_line_and_touch_nothing(whole: Path, name: str) -> None:
    document, words = MALFORMED[name]
    if isinstance(document, str):
        Path("params.yaml").write_text(document)
    else:
        write_params(document)
    before = contents(whole)
    with pytest.raises(GramError) as caught:
        all_stages()
    message = str(caught.value)
    assert "\n" not in message
    assert "params.yaml" in message or "split.test" in message
    for word in words:
        assert word in message, message
    assert contents(whole) == before


def test_the_file_itself(folder: Path) -> None:
    Path("params.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(GramError, match="UTF-8"):
        read_params()
    Path("params.yaml").unlink()
    with pytest.raises(GramError, match=r"params\.yaml: cannot be read"):
        read_params()


def test_unknown_names(folder: Path) -> None:
    with pytest.raises(GramError, match="no entry 'huge' in 'runs'; there are: tiny"):
        load_run("huge")
    with pytest.raises(GramError, match="no entry 'chess' in 'tasks'; there are: queens"):
        load_task("chess")


def test_a_mistake_in_one_run_does_not_stop_another(folder: Path) -> None:
    document = params()
    document["runs"]["broken"] = {"task": "nowhere"}
    write_params(document)
    assert load_run("tiny").task_name == "queens"


def test_stages_stop_where_an_earlier_one_is_missing(data: Path) -> None:
    with pytest.raises(GramError, match="no such model"):
        sample_run(load_run("tiny"))
    train_run(load_run("tiny"))
    with pytest.raises(GramError, match=r"trajectories\.parquet: no such table"):
        evaluate(load_run("tiny"))
    write_params(params(runs__tiny__model__dim=32))
    with pytest.raises(GramError, match="other model or task settings"):
        sample_run(load_run("tiny"))


def test_committed_params_are_the_default_profile(tmp_path: Path) -> None:
    compose("cpu", tmp_path / "params.yaml")
    committed = Path(__file__).parents[2] / "params.yaml"
    assert (tmp_path / "params.yaml").read_bytes() == committed.read_bytes()


@pytest.mark.parametrize("profile", profiles())
def test_every_profile_is_valid(profile: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    compose(profile, path)
    for name in read_params(path)["runs"]:
        run = load_run(name, path)
        Job.of(run)
        sample, widths = (
            run.section("sample", SampleConfig),
            run.section("evaluate", EvaluateConfig),
        )
        assert max(widths.widths) <= sample.width


# Table 7 and D.5: epochs, the rows of one, beta. Rows are training pairs of N-Queens, graphs of
# colouring, puzzles or boards of Sudoku, training pairs of ARC, and MNIST's images.
TABLE_7 = {
    "nqueens8": (3000, 7218, 0.07),
    "nqueens10": (1000, 107965, 0.045),
    "coloring8": (5000, 7002, 0.5),
    "coloring10": (5000, 13465, 0.45),
    "sudoku": (50_000, 1000, 0.1),
    "boards": (200, 50_000, 0.05),
    "mnist": (1800, 60_000, 0.07),
    "arc1": (200_000, 3081, 0.04),
    "arc2": (200_000, 4667, 0.1),
}


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """params.yaml of the paper's profile."""
    path = tmp_path_factory.mktemp("paper") / "params.yaml"
    compose("paper", path)
    return path


@pytest.mark.parametrize("task", TABLE_7)
@pytest.mark.parametrize("kind", ["gram", "twin"])
def test_paper_profile_has_the_papers_values(paper: Path, task: str, kind: str) -> None:
    """B.1, B.2, D.5 and Tables 4, 5 and 7."""
    name = f"{task}_{kind}"
    if name not in read_params(paper)["runs"]:
        assert kind == "twin", "every task has a guided run"
        assert not name.startswith(("nqueens", "coloring", "sudoku"))
        return
    run = load_run(name, paper)
    job, sample = Job.of(run), run.section("sample", SampleConfig)
    model, train, optim = job.model, job.train, job.train.optim
    epochs, rows, beta = TABLE_7[task]
    sudoku, guided = task in ("sudoku", "boards"), kind == "gram"
    assert (model.layers, model.dim, model.heads, model.ffn) == (2, 512, 8, 512)
    assert (model.K, model.T, model.N_sup) == (6 if sudoku else 4, 3, 16)
    assert model.core == ("mixer" if task == "sudoku" else "attention")
    assert model.guidance == ("full" if guided else "none")
    assert (model.posterior, model.decoder) == ("sum", "linear")
    assert (model.hierarchical, model.deep_supervision) == (True, True)
    assert (model.prefix_tokens, model.head_input) == (16, "first")
    if guided:
        assert (job.objective.beta, job.objective.balance) == (beta, 0.8)
    assert train.batch == 768
    assert train.steps == pytest.approx(epochs * rows / 768, rel=5e-3)
    assert train.ema == (0.999 if task == "boards" else 0.9999)
    assert (optim.name, optim.lr, optim.weight_decay, optim.clip) == ("adamw", 1e-4, 1.0, 1.0)
    assert (optim.beta1, optim.beta2, optim.warmup, optim.schedule) == (0.9, 0.95, 2000, "constant")
    if run.task.identified:
        assert (optim.identifier_lr, optim.identifier_decay) == (1e-2, 0.1)
    assert sample.depth == 16
    width = {"boards": 100_000, "mnist": 10_000, "arc1": 1, "arc2": 1}.get(task, 20)
    assert sample.width == max(run.section("evaluate", EvaluateConfig).widths) == width


def test_paper_profile_has_the_papers_tasks(paper: Path) -> None:
    """C.1, C.2, D.5 and Table 5."""

    def config(name: str) -> Any:
        return load_task(name, paper).config

    for size, remove in ((8, (5, 6, 7)), (10, (7, 8, 9))):
        queens = config(f"nqueens{size}")
        assert (queens.size, queens.remove) == (size, remove)
        assert (queens.split.by, queens.split.test) == ("input", 0.15)
        made = load_task(f"nqueens{size}", paper).generate(Path).metadata
        assert made["train_pairs"] == TABLE_7[f"nqueens{size}"][1]
    for vertices, test in ((8, 255), (10, 192)):
        graphs = config(f"coloring{vertices}")
        train = TABLE_7[f"coloring{vertices}"][1]
        assert (graphs.vertices, graphs.train, graphs.test) == (vertices, train, test)
    sudoku, boards = config("sudoku"), config("boards")
    assert (sudoku.size, sudoku.source.train, sudoku.augmentations) == (9, 1000, 1000)
    assert (boards.size, boards.source.train) == (9, 50_000)
    for name, version in (("arc1", "arcagi"), ("arc2", "arcagi2")):
        arc = config(name)
        assert (arc.source.version, arc.augmentations) == (version, 1000)
    digits = config("mnist")
    assert (digits.side, digits.patch) == (28, 2)


def test_writing_a_profile(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "runs.smoke_gram.train.steps=30"]) == 0
    assert load_run("smoke_gram").entry["train"]["steps"] == 30
    before = contents(folder)
    assert main(["huge"]) == 1
    assert main(["cpu", "runs.nowhere=1"]) == main(["cpu", "=3"]) == 1
    assert main(["cpu", "profile=smoke"]) == main(["cpu", "+profile=smoke"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-5:]
    assert contents(folder) == before


def test_a_sweep_that_was_not_run_has_a_table_without_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC asks for the output of a frozen stage, and would end before the report."""
    assert main(["cpu"]) == 0
    told = "sweep nqueens8 has not been run and has a table without rows: gram sweep nqueens8"
    assert told in capsys.readouterr().err
    path = trials_file("nqueens8")
    table = tables.read(path, "trials")
    assert len(table) == 0 and tables.provenance(table)["run"] == "nqueens8_gram"
    assert read_sweeps(folder) == []
    with pytest.raises(GramError, match="sweep nqueens8: has no trial, or none with"):
        promotion("nqueens8")
    path.write_bytes(b"of a sweep that was run")
    assert main(["cpu"]) == 0
    assert path.read_bytes() == b"of a sweep that was run"
    assert told not in capsys.readouterr().err
