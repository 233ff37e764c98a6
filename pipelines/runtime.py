"""The process around a command: allocator and threads, errors as one line, its end, Ray.

Imports nothing heavy at the top, because `entry` may start Python again with the settings that
must be there before torch is: on a virtual machine the allocator decides the speed (docs).
"""

import atexit
import errno
import gc
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

# glibc gives every large tensor back to the kernel and pays page faults for the next one. These
# keep freed memory in the process (trim never, mmap never), grow it in large pieces, and ask for
# huge pages, which spare address translation on a virtual machine.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
# OpenMP's threads spin while they wait; beside any other busy process that made a training step
# up to 25 times slower here. A short spin before sleep is also the fastest on a quiet machine.
# GNU's runtime hardly spins at all in a process with more threads of its own than cores, and a
# worker of Ray computes on a thread beside the main one, each with a team: unless it is told to be
# active, every small operation there waits for a thread to wake (docs/performance.md).
PATIENT = {"GOMP_SPINCOUNT": "2000", "OMP_WAIT_POLICY": "active"}
UNREAD = 120  # as Python itself ends where its last words cannot be written
# What writing to a disk fails by that a user can mend: a full one, and a place that is none.
DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EISDIR,
    errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


# A local Ray listens on loopback alone (Ray has no other switch for it than the one that says that
# this machine takes part in no cluster), waits for no node to be taken away, and looks for the end
# of training more often than every two seconds. The workers that it would start before anybody asks
# know nothing of our environment and would stay idle, beside those that then start. Without its
# dashboard nobody reads the log of tasks that every process would send each second.
LOCAL = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def cluster_address() -> str | None:
    """The Ray cluster that is named, or none: a Ray of this machine alone."""
    return os.environ.get("RAY_ADDRESS") or None


def local() -> dict[str, str]:
    """What a local Ray has in its environment, a user's own values first; nothing where a cluster
    is named."""
    if cluster_address():
        return {}
    return {name: os.environ.get(name, value) for name, value in LOCAL.items()}


def environment() -> dict[str, str]:
    """What every process of a run, workers included, has in its environment."""
    return {**ALLOCATOR, **PATIENT, **QUIET, **local()}


def entry(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(arguments)` as a program: with `environment()` from the start, and with an error
    that a user can mend printed as one line, exit code 1. What `atexit` was told before is not
    called: stages import what they need within `main`."""
    missing = {k: v for k, v in environment().items() if k not in os.environ}
    if missing and sys.platform == "linux":
        os.environ.update(missing)
        # A Ctrl-C while Python starts again waits for the block below, which ends with one line.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
    ended: list[int] = []
    atexit.register(_end, ended)  # registered first, it is called last
    try:
        if sys.platform == "linux":
            # Interrupted as it is imported, polars ends in a panic of Rust's, a traceback.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            import polars  # noqa: F401

            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        code = _told(main)
    except KeyboardInterrupt:
        code = fail("interrupted", code=130)
    ended.append(code)
    sys.exit(code)


@contextmanager
def importing() -> Iterator[None]:
    """Import what is heavy within. Modules make a million objects that are no garbage: to look for
    some all the while is a seventh of a stage's start."""
    before = gc.get_threshold()
    gc.set_threshold(10_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _end(ended: Sequence[int]) -> None:
    """End the process with the code in `ended`, if there is one, before Python is taken down: a
    thread of a library's that wakes up meanwhile is unwound through C++ that does not allow it, and
    a finished program ends by an abort (https://github.com/apache/arrow/issues/45017)."""
    if not ended:
        return
    code = ended[0]
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):
        code = code or UNREAD
    finally:
        os._exit(code)


def _told(main: Callable[[Sequence[str]], int | None]) -> int:
    """The exit code of `main`; an error that a user can mend is told."""
    from gram_core.errors import GramError

    try:
        code = main(sys.argv[1:]) or 0
        if sys.stdout is not None:
            with suppress(BrokenPipeError):  # who does not read on has read enough
                sys.stdout.flush()
        return code
    except GramError as error:
        return fail(str(error))
    except BrokenPipeError:
        if sys.stdout is None or not stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            raise
        return UNREAD
    except OSError as error:
        if error.errno not in DISK:
            raise
        return fail(f"{error.filename or 'disk'}: {error.strerror}")


def fail(message: str, code: int = 1) -> int:
    """Print one line to standard error and return the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def only(arguments: Sequence[str], usage: str) -> str:
    """The one argument of a program. Raises `GramError` where there are more or none."""
    from gram_core.errors import GramError

    if len(arguments) != 1:
        raise GramError(f"usage: python -m {usage}")
    return arguments[0]


def say(message: str) -> None:
    """One log line for a person."""
    print(message, file=sys.stderr, flush=True)


def threads() -> int:
    """CPU threads that this machine gives us."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(gpus: float | None = None) -> str:
    """ "cuda" where a GPU can be used, else "cpu"; "cpu" where zero `gpus` were asked for."""
    import torch

    return "cuda" if gpus != 0 and torch.cuda.is_available() else "cpu"
