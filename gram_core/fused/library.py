"""Operations on a CPU whose intermediate results stay in its caches: attention
(`gram_core.fused.attention`), a Gaussian's heads (`heads`), and whole transitions (`transition`).

As operations of torch's, compiled or not, what lies between two products is written to memory and
read back, and at small widths more time goes there than into the products.
`gram_core.model` is what they compute: it asks whether they fit, and computes by itself what does
not fit. The C++ beside this file is compiled at first use, in some twenty seconds, by this
machine's g++ for this machine's processor, and kept below `TORCH_EXTENSIONS_DIR` (by default
~/.cache/torch_extensions), where torch keeps such things.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).parent / "entry.cpp"
# Tuned for no processor in particular: tuned for Zen, GCC keeps a loop's counter in a vector
# register where it has no other left, and a product waits for it.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-mtune=generic", "-fno-math-errno", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip
COMPILING = 300  # seconds, at most
FAILURES: dict[int, tuple[type[Exception], str]] = {
    1: (ValueError, "no format, width or size of gram_core/fused"),
    2: (MemoryError, "no memory for gram_core/fused"),
}


@dataclass
class Process:
    """What this process has: the compiled operations, and the formats that it uses them for."""

    library: ctypes.CDLL | None = None
    formats: tuple[torch.dtype, ...] = ()


process = Process()


def fuse() -> bool:
    """Have this process use the fused operations on a CPU; whether it does.

    It does not, silently, where there is no g++ or no AVX2, and with a warning where compiling or
    loading fails. Results differ from those of separate operations by rounding; in bfloat16 they
    are closer to the exact ones, for less is rounded between products. They are the same
    whatever rows are computed together, and for any number of threads; but for the gradients of
    weights, whose sums depend on both."""
    if process.library is not None or shutil.which("g++") is None:
        return process.library is not None
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
    # With AMX torch's own products are several times as fast as these.
    half = "__AVX512BF16__" in macros and "__AMX_BF16__" not in macros
    process.library = library
    process.formats = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    return True


def _gxx(*arguments: str) -> str:
    done = subprocess.run(
        ["g++", *arguments], check=True, capture_output=True, text=True, timeout=COMPILING
    )
    return done.stdout


def _digest(files: Iterable[Path], *texts: str) -> str:
    digest = hashlib.sha256("".join(texts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compiled(macros: str) -> ctypes.CDLL:
    """The library for this source, compiler and processor, of which the last two are told by what
    the compiler defines."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    key = _digest([SOURCE, *sorted(SOURCE.parent.glob("*.h"))], " ".join(FLAGS), macros)
    library = Path(root) / "gram" / f"{key}.so"
    if library.exists():
        try:
            if _whole(library.read_bytes()):
                return ctypes.CDLL(str(library))
        except OSError:  # of another system that shares the folder
            pass
        library.unlink(missing_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, however many processes compile at once; and kept if it can be loaded.
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        new = Path(place) / library.name
        _gxx(*FLAGS, "-o", str(new), str(SOURCE))
        loaded = ctypes.CDLL(str(new))
        with new.open("r+b") as file:
            checksum = hashlib.sha256(file.read()).digest()
            file.write(checksum)
            file.flush()
            os.fsync(file.fileno())
        new.replace(library)
    return loaded


def _whole(content: bytes) -> bool:
    """Whether a library ends with the checksum of what is before it, which no loader looks at. One
    that is cut off, or has holes, of a crash or a full disk, would end the process that maps it."""
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


VECTOR = 16  # numbers: widths are multiples of it, with gradients of two
POINTERS = ctypes.POINTER(ctypes.c_void_p)


def fields(places: str, sizes: str, numbers: str, flags: str) -> list[tuple[str, Any]]:
    """Those of a call's structure, by name: places (with a star: arrays of places), integers,
    float32 and flags."""
    return [
        *((x.strip("*"), POINTERS if "*" in x else ctypes.c_void_p) for x in places.split()),
        *((x, ctypes.c_long) for x in sizes.split()),
        *((x, ctypes.c_float) for x in numbers.split()),
        *((x, ctypes.c_int) for x in flags.split()),
    ]


def array(tensors: Iterable[Tensor | None]) -> Any:
    """An array of where they are, for a field of `fields`."""
    found = [None if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(found))(*found)


def room_for_gradients(weights: Iterable[Tensor], of: Tensor) -> list[Tensor]:
    """Tensors like `weights` for the sums of a backward over the rows of `of`: it fills them, if
    there are rows."""
    make = torch.empty_like if of.numel() else torch.zeros_like
    return [make(w, memory_format=torch.contiguous_format) for w in weights]


def call(name: str, arguments: ctypes.Structure) -> None:
    """Call a function of the library's. Raises what it failed by."""
    assert process.library is not None
    failure = getattr(process.library, name)(ctypes.byref(arguments))
    if failure:
        kind, message = FAILURES[failure]
        raise kind(message)


def products() -> torch.dtype:
    """The format that products are computed in on a CPU here: autocast's, or float32."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return torch.float32


def wanted(*state: Tensor) -> bool:
    """Whether anything here is for these at all: on a CPU, in a process with `fuse`, in its
    formats, and all of one shape [B, L, D]."""
    formats = process.formats
    return products() in formats and all(
        x.is_cpu and x.dtype in formats and x.dim() == 3 and x.shape == state[0].shape
        for x in state
    )


def cut_up(module: nn.Module) -> bool:
    """Whether the module's weights are parts that ZeRO's third stage brings together as it calls
    the modules that own them, on all workers in the same order: nothing may go past these calls."""
    return any(hasattr(parameter, "ds_status") for parameter in module.parameters())


# What torch knows the operations by; each module beside this one defines its own. A compiled
# graph holds what these modules say of an operation's results, and torch's cache of graphs, which
# outlives a release, knows an operation by its name alone: so the name says which modules they are.
NAMESPACE = f"gram_{_digest(sorted(SOURCE.parent.glob('*.py')))}"
operations: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
ops: Any = getattr(torch.ops, NAMESPACE)
