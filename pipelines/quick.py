"""A report over all tasks in a minute: `python -m pipelines.quick [PROFILE]`, by default `smoke`.

Runs a profile's stages one after the other in this process, in .gram/quick, so that params.yaml and
what `dvc repro` made stay as they are.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.runtime import entry, fail, say

FOLDER = Path(".gram") / "quick"


def run_here(profile: str, overrides: Sequence[str] = ()) -> None:
    """All stages of `profile` in the working folder, as `dvc repro` would run them; `overrides`
    are Hydra's."""
    from pipelines.dataset import augment, generate
    from pipelines.evaluate import evaluate
    from pipelines.params import FILE, load_run, load_task, read_params
    from pipelines.profiles import compose
    from pipelines.report.build import build
    from pipelines.sample import sample_run
    from pipelines.train import train_run

    compose(profile, FILE, overrides)
    params = read_params()
    for name in params["tasks"]:
        task = load_task(name)
        generate(name, task)
        augment(name, task)
        say(f"{name}: data ready")
    for name in params["runs"]:
        run = load_run(name)
        train_run(run)
        sample_run(run)
        evaluate(run)
    build(Path(), params["runs"], Path("report"))


def main(arguments: Sequence[str]) -> int:
    """Run the profile and say where its report is."""
    from pipelines.profiles import profiles

    profile = arguments[0] if arguments else "smoke"
    if profile not in profiles():
        return fail(f"no profile {profile!r}; there are: {', '.join(profiles())}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    os.chdir(FOLDER)
    run_here(profile)
    say(f"open {FOLDER / 'report' / 'index.html'}")
    return 0


if __name__ == "__main__":
    entry(main)
