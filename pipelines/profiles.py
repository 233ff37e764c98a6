"""Writes a profile to params.yaml: `python -m pipelines.profiles [PROFILE [OVERRIDE ...]]`.

The same composition that DVC does for `dvc exp run -S profile=NAME`, for `dvc repro` by itself.
Overrides are Hydra's, e.g. `runs.nqueens8_gram.train.seed=1`.
"""

from collections.abc import Sequence
from pathlib import Path

from pipelines.params import FILE, read_params, trials_file
from pipelines.runtime import entry, fail, say

CONF = Path(__file__).parent / "conf"


def profiles() -> list[str]:
    """The names of all profiles."""
    return sorted(path.stem for path in (CONF / "profile").glob("*.yaml"))


def compose(profile: str, path: Path, overrides: Sequence[str] = ()) -> None:
    """Write `profile` with `overrides` to `path`."""
    from dvc.utils.hydra import compose_and_dump

    chosen = [f"profile={profile}", *overrides]
    partial = path.with_name(f".partial-{path.name}")  # whole or not at all
    try:
        compose_and_dump(str(partial), str(CONF.absolute()), None, "config", "", chosen)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    """Compose into params.yaml."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    profile, *overrides = arguments or ["cpu"]
    if profile not in profiles():
        return fail(f"no profile {profile!r}; there are: {', '.join(profiles())}")
    if any(override.lstrip("+~").partition("=")[0] == "profile" for override in overrides):
        return fail("the profile comes first and alone: python -m pipelines.profiles PROFILE")
    try:
        compose(profile, FILE, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return fail(f"profile {profile}: {error}")
    say(f"{FILE}: the profile {profile}")
    if not all(trials_file(name).exists() for name in read_params().get("sweeps", {})):
        from pipelines.sweep import tables_of_all  # takes as long as torch

        for name in tables_of_all():
            say(f"sweep {name} has not been run and has a table without rows: gram sweep {name}")
    return 0


if __name__ == "__main__":
    entry(main)
