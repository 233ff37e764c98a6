"""Strict configuration: a plain mapping in, a frozen object out, and back.

Each component's config class stands beside the component; this module only holds what they
share. Unknown keys, wrong types and contradictions raise `ConfigError` with the key's full name.
It knows nothing of YAML or of where a mapping came from: callers pass that name in.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

import msgspec

from gram_core.errors import GramError

LARGE = 1e12  # keeps infinity out, which JSON has no word for
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0, le=LARGE)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0, le=LARGE)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Decay = Annotated[float, msgspec.Meta(ge=0, lt=1)]  # of a moving average: 1 would never move it
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # what torch, NumPy and Arrow all take


class ConfigError(GramError):
    """A setting that cannot be used; the message names the key and what would be right."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every config class. Subclasses add `frozen=True, kw_only=True` and reject
    contradictions in `__post_init__` by raising `ValueError`."""


C = TypeVar("C", bound=Config)


def load(cls: type[C], mapping: Mapping[str, Any], where: str) -> C:
    """Build `cls` from a mapping.

    `where` names the mapping in the user's spelling, e.g. `params.yaml: runs.gram.train`.
    Raises `ConfigError` for an unknown key, a wrong type, a value out of range or a
    contradiction between keys.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {mapping!r}")
    known = cls.__struct_fields__
    for key in mapping:
        if key not in known and not (key == "kind" and cls.__struct_config__.tag):
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}.{key}: unknown key; {hint}")
    try:
        return msgspec.convert(mapping, cls)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise ConfigError(f"{where}{path.rstrip('`')}: {message}") from None


def dump(config: Config) -> dict[str, Any]:
    """The mapping that `load` turns into an equal config; JSON-compatible."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    return plain
