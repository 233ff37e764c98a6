"""torch.compile with a way back: a module runs uncompiled where it cannot be compiled."""

import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def compiled(module: Module, say: Callable[[str], None], *, dynamic: bool = False) -> Module:
    """`module` with its forward compiled, for static shapes or for any number of rows; unchanged,
    with one line that says so, where this machine has no compiler for it or compiling the forward
    fails. (A backward is compiled where it is first called, out of reach from here.)"""
    device = next(module.parameters()).device
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        say("no C++ compiler found: running without torch.compile, which is slower")
        return module
    # Here, because it takes as long to import as torch itself, and most processes compile nothing.
    from torch._dynamo.exc import TorchDynamoException

    plain = module.forward
    fast = torch.compile(plain, dynamic=dynamic)

    def forward(*arguments: Any) -> Any:
        try:
            return fast(*arguments)
        except TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            say(f"torch.compile failed ({reason}): running without it, which is slower")
            module.forward = plain
            return plain(*arguments)

    module.forward = forward
    return module
