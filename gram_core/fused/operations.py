"""Two operations on a CPU whose intermediate results stay in its caches: attention, forward and
backward, and a whole stack of blocks without gradients.

As operations of torch's, compiled or not, a head's scores are written to memory and read back four
times, and more time goes there than into the products; at small widths so it is with all of a
block. `gram_core.model.layers` is what they compute: it asks whether they fit, and
computes by itself what does not fit. The C++ beside this file is compiled at first use, in some ten
seconds, by this machine's g++ for this machine's processor, and kept below `TORCH_EXTENSIONS_DIR`
(by default ~/.cache/torch_extensions), where torch keeps such things.

Shapes: B batch, L positions, D width, Q = 3 D, E half of a head's channels.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

PARTS = [
    Path(__file__).parent / name for name in ("entry.cpp", "stack.h", "attention.h", "lanes.h")
]
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILING = 300  # seconds, at most
CHANNELS = (16, 32, 64, 128)  # of a head, that attention is compiled for
VECTOR = 16  # numbers: widths are multiples of it
FAILURES: dict[int, tuple[type[Exception], str]] = {
    1: (ValueError, "no format or width of gram_core/fused"),
    2: (MemoryError, "no memory for gram_core/fused"),
}


@dataclass
class _Process:
    """What this process has: the compiled operations, and the formats that it uses them for."""

    library: ctypes.CDLL | None = None
    formats: tuple[torch.dtype, ...] = ()


_process = _Process()


def fuse() -> bool:
    """Have this process use the fused operations on a CPU; whether it does.

    It does not, silently, where there is no g++ or no AVX2, and with a warning where compiling or
    loading fails. Results differ from those of separate operations by rounding; in bfloat16 they
    are closer to the exact ones, for less is rounded between products. They are the same
    whatever rows are computed together, and for any number of threads."""
    if _process.library is not None or shutil.which("g++") is None:
        return _process.library is not None
    try:
        macros = _gxx("-march=native", "-E", "-dM", "-x", "c++", os.devnull)
        if "__AVX2__" not in macros:
            return False
        library = _compiled(macros)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or "").strip() or str(error)
        reason = next((x for x in said.splitlines() if "error" in x), said.partition("\n")[0])
        warnings.warn(f"nothing is fused, which is slower: {reason}", stacklevel=2)
        return False
    pointer, long, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.gram_attend.argtypes = [pointer] * 4 + [long] * 4 + [number] * 2
    library.gram_stack.argtypes = [
        pointer, number, pointer, number, pointer, pointer, long, pointer, *[long] * 6,
        ctypes.c_float, number, number,
    ]  # fmt: skip
    # With AMX torch's own products are several times as fast as these.
    half = "__AVX512BF16__" in macros and "__AMX_BF16__" not in macros
    _process.library = library
    _process.formats = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    return True


def _gxx(*arguments: str) -> str:
    done = subprocess.run(
        ["g++", *arguments], check=True, capture_output=True, text=True, timeout=COMPILING
    )
    return done.stdout


def _compiled(macros: str) -> ctypes.CDLL:
    """The library for this source, compiler and processor, of which the last two are told by what
    the compiler defines."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    key = hashlib.sha256(" ".join(FLAGS).encode() + macros.encode())
    for part in PARTS:
        key.update(part.read_bytes())
    library = Path(root) / "gram" / f"{key.hexdigest()[:16]}.so"
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # of a crash, or of another system that shares the folder
            library.unlink(missing_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, however many processes compile at once; and kept if it can be loaded.
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        new = Path(place) / library.name
        _gxx(*FLAGS, "-o", str(new), str(PARTS[0]))
        loaded = ctypes.CDLL(str(new))
        new.replace(library)
    return loaded


def fits_attention(qkv: Tensor, rope: Tensor, heads: int) -> bool:
    """Whether `attend` takes them: on a CPU, in a process with `fuse`, in one of its formats and
    widths, and of shapes that go together."""
    if not qkv.is_cpu or qkv.dtype not in _process.formats or qkv.dim() != 3:
        return False
    channels = 2 * rope.shape[-1]
    return (
        channels in CHANNELS
        and qkv.shape[2] == 3 * heads * channels
        and rope.shape[:2] == (2, qkv.shape[1])
    )


def wants_stack(a: Tensor, b: Tensor) -> bool:
    """Whether `stack` is for these at all: on a CPU, in a process with `fuse`, in its formats, and
    without gradients."""
    return (
        not torch.is_grad_enabled()
        and a.is_cpu
        and a.dim() == 3
        and a.shape == b.shape
        and all(kind in _process.formats for kind in (products(), a.dtype, b.dtype))
    )


def cut_up(module: nn.Module) -> bool:
    """Whether the module's weights are parts that ZeRO's third stage brings together as it calls
    the modules that own them, on all workers in the same order: nothing may go past these calls."""
    return any(hasattr(parameter, "ds_status") for parameter in module.parameters())


def fits_stack(a: Tensor, weights: Sequence[Tensor], rope: Tensor | None, heads: int) -> bool:
    """Whether `stack` takes these weights for what it is wanted for: whole, in float32, in widths
    of its, and of shapes that go together."""
    _, length, dim = a.shape
    hidden, ffn = weights[1].shape[-1], weights[3].shape[-1]
    if rope is None:
        first = [(2 * hidden, length), (length, hidden)]
        fits = hidden % VECTOR == 0
    else:
        channels = 2 * rope.shape[-1]
        first = [(3 * dim, dim), (dim, dim)]
        fits = channels in CHANNELS and dim == heads * channels and rope.shape[1] == length
    shapes = [*first, (2 * ffn, dim), (dim, ffn)] * (len(weights) // 4)
    return (
        fits
        and dim % VECTOR == ffn % VECTOR == 0
        and all(w.dtype == torch.float32 for w in weights)
        and [tuple(w.shape) for w in weights] == shapes
    )


def products() -> torch.dtype:
    """The format that products are computed in on a CPU here: autocast's, or float32."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return torch.float32


def attend(
    qkv: Float[Tensor, "B L Q"], rope: Float[Tensor, "2 L E"], heads: int
) -> Float[Tensor, "B L D"]:
    """Softmax attention between rotated queries and keys, in the format of `qkv`; `rope` is the
    table of `gram_core.model.layers.rope_table`. For what `fits_attention`."""
    out: Tensor = torch.ops.gram.attend(qkv, rope, heads)
    return out


def stack(
    a: Float[Tensor, "B L D"],
    b: Float[Tensor, "B L D"],
    weights: Sequence[Tensor],
    rope: Float[Tensor, "2 L E"] | None,
    heads: int,
    eps: float,
) -> Float[Tensor, "B L D"]:
    """Post-norm blocks of a + b, in the format of `products`: attention between rotated queries and
    keys where there is a table `rope`, else a SwiGLU over positions, then one over channels. Four
    `weights` a block, [out, in]: of qkv and out, or gate and up and down; of gate and up and down.
    For what `wants_stack` and `fits_stack`. No gradients."""
    half = products() == torch.bfloat16
    out: Tensor = torch.ops.gram.stack(a, b, list(weights), rope, heads, eps, half)
    return out


def _checked(failure: int) -> None:
    if failure:
        kind, message = FAILURES[failure]
        raise kind(message)


def _call(qkv: Tensor, rope: Tensor, heads: int, grad: Tensor | None, out: Tensor) -> Tensor:
    assert _process.library is not None
    batch, length, width = qkv.shape
    _checked(_process.library.gram_attend(
        qkv.data_ptr(), rope.data_ptr(), None if grad is None else grad.data_ptr(), out.data_ptr(),
        batch, length, heads, width // (3 * heads),
        qkv.dtype == torch.bfloat16, torch.get_num_threads(),
    ))  # fmt: skip
    return out


def _attend(qkv: Tensor, rope: Tensor, heads: int) -> Tensor:
    qkv, rope = qkv.contiguous(), rope.float().contiguous()
    return _call(qkv, rope, heads, None, _like_attended(qkv, rope, heads))


def _attend_backward(grad: Tensor, qkv: Tensor, rope: Tensor, heads: int) -> Tensor:
    qkv, rope, grad = qkv.contiguous(), rope.float().contiguous(), grad.contiguous()
    return _call(qkv, rope, heads, grad, qkv.new_empty(qkv.shape))


def _like_attended(qkv: Tensor, rope: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def _stack(
    a: Tensor,
    b: Tensor,
    weights: list[Tensor],
    rope: Tensor | None,
    heads: int,
    eps: float,
    half: bool,
) -> Tensor:
    assert _process.library is not None
    a, b, weights = a.contiguous(), b.contiguous(), [w.contiguous() for w in weights]
    rope = None if rope is None else rope.float().contiguous()
    batch, length, dim = a.shape
    out = _like_stack(a, b, weights, rope, heads, eps, half)
    places = (ctypes.c_void_p * len(weights))(*(w.data_ptr() for w in weights))
    _checked(_process.library.gram_stack(
        a.data_ptr(), a.dtype == torch.bfloat16, b.data_ptr(), b.dtype == torch.bfloat16,
        None if rope is None else rope.data_ptr(), places, len(weights) // 4, out.data_ptr(),
        batch, length, dim, heads, weights[3].shape[1], weights[1].shape[1] if rope is None else 0,
        eps, half, torch.get_num_threads(),
    ))  # fmt: skip
    return out


def _like_stack(
    a: Tensor,
    b: Tensor,
    weights: list[Tensor],
    rope: Tensor | None,
    heads: int,
    eps: float,
    half: bool,
) -> Tensor:
    return a.new_empty(a.shape, dtype=torch.bfloat16 if half else torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    qkv, rope, ctx.heads = inputs
    ctx.save_for_backward(qkv, rope)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.gram.attend_backward(grad, *ctx.saved_tensors, ctx.heads), None, None


def _no_second(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError("fused attention has no second derivative")


_operations: Any = torch.library.Library("gram", "DEF")  # type: ignore[no-untyped-call]
_operations.define("attend(Tensor qkv, Tensor rope, int heads) -> Tensor")
_operations.define("attend_backward(Tensor grad, Tensor qkv, Tensor rope, int heads) -> Tensor")
_operations.define(
    "stack(Tensor a, Tensor b, Tensor[] weights, Tensor? rope, int heads, float eps, bool half)"
    " -> Tensor"
)
for _name, _real, _fake in (
    ("attend", _attend, _like_attended),
    ("attend_backward", _attend_backward, lambda grad, qkv, rope, heads: qkv.new_empty(qkv.shape)),
    ("stack", _stack, _like_stack),
):
    _operations.impl(_name, _real, "CPU")
    torch.library.register_fake(f"gram::{_name}", _fake, lib=_operations)
torch.library.register_autograd("gram::attend_backward", _no_second, lib=_operations)
torch.library.register_autograd("gram::attend", _back, setup_context=_keep, lib=_operations)
