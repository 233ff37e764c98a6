"""The best trial of a sweep as a patch of params.yaml, for a person to review and commit."""

import difflib
import io
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML

from gram_core.errors import GramError
from pipelines.params import FILE, read_params, trials_file
from pipelines.report.sweeps import read_sweep
from pipelines.space import put


def promotion(name: str, path: Path = FILE) -> str:
    """A unified diff of params.yaml that gives the sweep's run the values of its best trial, below
    lines that say where they come from and how DVC takes them. Raises `GramError`."""
    found = read_sweep(trials_file(name))
    best = found.best
    if best is None:
        raise GramError(f"sweep {name}: has no trial, or none with a value of {found.metric}")
    if found.run not in read_params(path)["runs"]:
        raise GramError(f"sweep {name}: its run {found.run!r} is no longer in {path}")
    yaml = YAML()
    yaml.width = 1 << 16
    # An empty value, which it would write, is null too, but the line would seem changed.
    yaml.representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    before = path.read_text()
    document = yaml.load(before)
    entry = document["runs"][found.run]
    # Hydra's for a key that the run does not write out: to append it.
    plus = {key: "" if _there(entry, key) else "+" for key in best.params}
    for key, value in best.params.items():
        put(entry, key, value)
    after = _dumped(yaml, document)
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    patch = "".join(difflib.unified_diff(old, new, f"a/{path}", f"b/{path}"))
    fixed = " ".join(f"{key}={value}" for key, value in found.fixed.items())
    overrides = [
        f"{plus[key]}runs.{found.run}.{key}={'null' if value is None else value}"
        for key, value in best.params.items()
    ]
    head = [
        f"# sweep {name}: {best.name}, best of {len(found.trials)} trials: {found.metric} "
        f"{best.value:.4g} at step {best.step}",
        f"# apply: gram sweep {name} --promote | git apply   (and the same in the profile that"
        if patch
        else f"# {path} has these values already (see to it that so has the profile that",
        "# params.yaml is composed from, pipelines/conf/profile/)",
        *([f"# every trial also had {fixed}; the patch leaves that to you"] if fixed else []),
        "# try: dvc exp run " + " ".join(f"-S {override}" for override in overrides),
    ]
    return "\n".join(head) + "\n" + patch


def _there(node: object, key: str) -> bool:
    """Whether a dotted key is written out."""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _dumped(yaml: YAML, document: object) -> str:
    text = io.StringIO()
    yaml.dump(document, text)
    return text.getvalue()
