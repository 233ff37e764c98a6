"""Where the time goes: `python -m benchmarks.profile PHASE SIZE DTYPE [--rows N]`.

One warm turn of `benchmarks.speed`'s measurement (iterations of training, or a rollout) under
torch's profiler: the device's kernels by kind and the largest of them, each as a share of the
turn's wall time; on a GPU also the share in which it had nothing to do. Prints Markdown.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import (
    DTYPES,
    LOADS,
    MODELS,
    check_rows,
    device,
    sampling,
    synchronise,
    training,
)
from pipelines.compute import compute_with
from pipelines.runtime import device_name, entry, threads

WARM = 3  # turns before the one that is looked at
LARGEST = 25
# Parts of kernels' names, the first that fits: inductor's, which hold the names of what they fuse,
# attention, cuBLAS and oneDNN, torch's own.
KINDS = {
    "fused kernels": ("triton", "cpp_fused", "graph_"),
    "attention": ("flash", "fmha", "attention", "cudnn"),
    "matrix products": ("gemm", "nvjet", "cutlass", "mkldnn", "addmm", "::mm", "bmm", "matmul"),
    "optimiser and average": ("multi_tensor", "foreach", "adam"),
    "copies": ("memcpy", "memset", "copy"),
}


class Profiled(Exception):  # noqa: N818
    """The turn was profiled."""


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    low = name.lower()
    for kind, parts in KINDS.items():
        if any(part in low for part in parts):
            return kind
    return "others"


class Turns:
    """Called after each turn of a measurement: profiles the one after the warm ones."""

    def __init__(self) -> None:
        self.seen = 0
        self.profiler: profile | None = None
        self.wall = 0.0
        self._start = 0.0

    def __call__(self, seconds: float) -> None:
        self.seen += 1
        if self.profiler is not None:
            synchronise()
            self.wall = time.perf_counter() - self._start
            self.profiler.stop()
            raise Profiled
        if self.seen == WARM:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities)
            self.profiler.start()
            self._start = time.perf_counter()


def spent(profiler: profile) -> dict[str, tuple[float, int]]:
    """Seconds and calls of each kernel, its own alone."""
    gpu = torch.cuda.is_available()
    found: dict[str, tuple[float, int]] = {}
    events: Any = profiler.key_averages()
    for event in events:
        if event.is_user_annotation:  # a range over kernels that are counted themselves
            continue
        if event.device_type.name != ("CUDA" if gpu else "CPU"):
            continue
        micro = event.self_device_time_total if gpu else event.self_cpu_time_total
        found[event.key] = (micro / 1e6, event.count)
    return found


def main(arguments: Sequence[str]) -> None:
    """Profile a turn and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile")
    parser.add_argument("phase", choices=("train", "sample"))
    parser.add_argument("size", choices=tuple(MODELS))
    parser.add_argument("dtype", choices=tuple(DTYPES))
    parser.add_argument("--rows", type=int, help="rows of the batch, in place of the usual ones")
    options = parser.parse_args(arguments)
    if options.rows is not None:
        check_rows(parser, options.rows, sampled=options.phase == "sample")
    compute_with(threads())
    from torch._inductor import config

    config.cpp.enable_kernel_profile = True
    turns = Turns()
    # The largest batch that benchmarks.speed takes, which fills the device.
    rows = options.rows or max(LOADS[device_name()].rows[options.phase, options.size])
    measure = training if options.phase == "train" else sampling
    with suppress(Profiled):
        measure(options.size, options.dtype, rows, turns)
    assert turns.profiler is not None
    kernels = spent(turns.profiler)
    kinds: dict[str, tuple[float, int]] = {}
    for name, (seconds, calls) in kernels.items():
        before = kinds.get(kind_of(name), (0.0, 0))
        kinds[kind_of(name)] = before[0] + seconds, before[1] + calls
    if torch.cuda.is_available():
        kinds["nothing"] = turns.wall - sum(kind[0] for kind in kinds.values()), 0
    print(f"{device()}, {options.phase} {options.size} {options.dtype}, "
          f"{rows} rows, "
          f"a turn of {turns.wall * 1e3:.1f} ms\n")  # fmt: skip
    print("| kernels | share of the time | calls |\n|---|---|---|")
    for name, (seconds, calls) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        print(f"| {name} | {seconds / turns.wall:.1%} | {calls} |")
    print("\n| the largest | share | calls | microseconds a call |\n|---|---|---|---|")
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:LARGEST]
    for name, (seconds, calls) in largest:
        short = name if len(name) <= 90 else f"{name[:87]}..."
        print(f"| `{short}` | {seconds / turns.wall:.1%} | {calls} | {seconds / calls * 1e6:.1f} |")


if __name__ == "__main__":
    entry(main)
