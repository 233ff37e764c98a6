"""What tasks and models agree on: how many tokens of which values, and what image they form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, UInt8
from torch import Tensor


@dataclass(frozen=True)
class TokenShape:
    """What a task and its data ask of a model: tokens, vocabulary, learned puzzle identifiers, and
    for images their height, width and side of a patch."""

    length: int
    vocab: int
    puzzles: int = 1
    image: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> "TokenShape":
        """The shape that `vars` turned into a mapping, JSON in between or not."""
        image = mapping.get("image")
        return cls(**{**mapping, "image": None if image is None else tuple(image)})

    @property
    def positions(self) -> int:
        """M: content positions of the recursion."""
        return self.length if self.image is None else self.length // self.image[2] ** 2


# A task's rule: which answers to these inputs are valid.
Verifier = Callable[[UInt8[Tensor, "B S"], UInt8[Tensor, "B S"]], Bool[Tensor, " B"]]
