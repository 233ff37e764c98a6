"""torch.compile with a way back: what cannot be compiled runs as it is."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Say = Callable[[str], None]
# Tensors of a forward's arguments, and along which axis the number of their rows may change.
Rows = Callable[..., Iterable[tuple[Tensor, int]]]


def compiled(module: Module, say: Say, *, rows: Rows | None = None, graphs: bool = True) -> Module:
    """`module` with its forward compiled, for static shapes or, along the axes that `rows` names,
    for any size but one alone; unchanged, with one line that says so, where this machine has no
    compiler for it or compiling the forward fails. (A backward is compiled where it is first
    called, out of reach from here.)

    On a GPU the kernels of each shape of inputs are recorded as a CUDA graph, unless without
    `graphs`: what a graph gives lies in memory that its next run writes to, gradients among it,
    and those that are kept over several calls must not."""
    device = next(module.parameters()).device
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        say("no C++ compiler found: running without torch.compile, which is slower")
        return module
    recorded = graphs and device.type == "cuda"
    mode = "reduce-overhead" if recorded else None
    fast = with_way_back(module.forward, say, dynamic=None if rows else False, mode=mode)

    def forward(*arguments: Any) -> Any:
        if rows is not None:
            # These axes alone: were all sizes left open, those that happen to be equal at first
            # would be taken for one, and compiled again once they differ.
            for tensor, axis in rows(*arguments):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        if not recorded:
            return fast(*arguments)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return kept(fast(*arguments))

    module.forward = forward if recorded or rows else fast
    return module


def with_way_back(plain: Callable[..., Any], say: Say, **options: Any) -> Callable[..., Any]:
    """`plain` compiled with these options of torch.compile; `plain` itself from where compiling it
    fails on, with one line that says so."""
    # Here, because it takes as long to import as torch itself, and most processes compile nothing.
    from torch._dynamo.exc import TorchDynamoException

    now = torch.compile(plain, **options)

    def call(*arguments: Any) -> Any:
        nonlocal now
        try:
            return now(*arguments)
        except TorchDynamoException as error:
            if now is plain:
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            say(f"torch.compile failed ({reason}): running without it, which is slower")
            now = plain
            return plain(*arguments)

    return call


def kept(value: Any) -> Any:
    """Copies of all tensors in tuples and dataclasses: those that a CUDA graph gives are written
    over by its next run."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(map(kept, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: kept(getattr(value, f.name)) for f in fields(value)})
    return value
