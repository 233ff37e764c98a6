"""How the fused operations are compiled and kept; and where they are not used."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from gram_core.fused import library

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has fused nothing, and a place where nothing is compiled. What is, there, is
    only loaded: a source of two files, which is not the operations', will do."""
    source = tmp_path / "source" / "entry.cpp"
    source.parent.mkdir()
    source.write_text('#include "one.h"\nextern "C" int answer() { return ONE; }\n')
    source.with_name("one.h").write_text("#define ONE 1\n")
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setattr(library.process, "library", None)
    monkeypatch.setattr(library.process, "formats", ())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    return tmp_path


def test_without_a_compiler_nothing_is_fused_and_nothing_is_said(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library.fuse()
    assert library.process.formats == ()


@needs_gxx
def test_a_processor_without_avx2_is_left_alone(fresh, monkeypatch):
    monkeypatch.setattr(library, "_gxx", lambda *arguments: "#define __SSE2__ 1")
    assert not library.fuse()


@pytest.fixture
def compiler(fresh, monkeypatch):
    """Puts a g++ before all others that knows AVX2, and compiles by a script of ours."""

    def put(compiling: str) -> None:
        path = fresh / "g++"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *dM*) echo "#define __AVX2__ 1"; exit;; esac\n{compiling}\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(fresh), prepend=os.pathsep)

    return put


def kept(folder: Path) -> list[Path]:
    """What compiling has left."""
    return list((folder / "built" / "gram").iterdir())


def test_a_compiler_that_fails_is_told_in_one_line_and_leaves_nothing(fresh, compiler):
    compiler('echo "note: long" >&2; echo "fatal error: no such header" >&2; exit 1')
    with pytest.warns(UserWarning, match="nothing is fused.*fatal error: no such header") as seen:
        assert not library.fuse()
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert kept(fresh) == []


def test_a_compiler_that_fails_silently_is_told_too(fresh, compiler):
    compiler("echo >&2; exit 1")
    with pytest.warns(UserWarning, match="nothing is fused.*exit status 1"):
        assert not library.fuse()


def test_a_library_that_is_none_is_told_in_one_line(fresh, compiler):
    compiler('while [ "$1" != -o ]; do shift; done; echo no > "$2"')
    with pytest.warns(UserWarning, match="nothing is fused"):
        assert not library.fuse()
    assert library.process.library is None
    assert kept(fresh) == []


@pytest.mark.parametrize("damage", ["other", "cut", "holes"])
def test_a_damaged_library_is_compiled_anew(fused_here, fresh, damage):
    """Mapped as it is, one that is cut off ends the process, and each that comes after it."""
    assert library.fuse()
    (built,) = kept(fresh)
    content = built.read_bytes()
    half = len(content) // 2
    bad = {"other": b"no", "cut": content[:half], "holes": content[:half] + bytes(half)}[damage]
    built.unlink()  # not written over: this process may have it mapped
    built.write_bytes(bad)
    library.process.library = None
    assert library.fuse()
    assert built.stat().st_size == len(content)
    assert built.read_bytes() != bad


def test_it_is_compiled_once_for_a_source(fused_here, fresh, monkeypatch):
    assert library.fuse()
    (built,) = kept(fresh)
    written = built.stat().st_mtime_ns
    library.process.library = None
    assert library.fuse()
    assert built.stat().st_mtime_ns == written
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g0"))
    library.process.library = None
    assert library.fuse()
    assert len(kept(fresh)) == 2
    library.SOURCE.with_name("one.h").write_text("#define ONE 2\n")
    library.process.library = None
    assert library.fuse()
    assert len(kept(fresh)) == 3
    assert library.process.library.answer() == 2


def test_one_openmp_runtime_serves_torch_and_the_operations(fused_here):
    """Two would keep two sets of threads, which wait for each other's cores."""
    code = (
        "import torch; from gram_core.fused import attention, library; assert library.fuse()\n"
        "from gram_core.model.layers import rope_table\n"
        "torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "attention.attend(torch.randn(4, 8, 48), rope_table(8, 16, 100.0), 1)\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in lines if 'omp.so' in line or 'omp5.so' in line}))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


GRAPH = """
import torch
from gram_core.fused import heads, library
assert library.fuse()
gate_up, down = torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(32, 32, bias=False)
def mean(x):
    return heads.gaussian(x, heads.Heads(mean=[gate_up.weight, down.weight]))[0].sum()
torch.compile(mean)(torch.randn(2, 5, 32, requires_grad=True)).backward()
"""


def test_a_graph_that_torch_kept_for_other_operations_is_not_taken(fused_here, tmp_path):
    """The same call, of another release whose operation leaves the same behind in another order."""
    package = Path(library.__file__).parents[1]
    other, cache = tmp_path / "other", tmp_path / "cache"
    shutil.copytree(package, other / "gram_core")
    cache.mkdir()
    module = other / "gram_core" / "fused" / "heads.py"
    text = module.read_text()
    shape = "(*positions, count * 2 * weights[1].shape[1])"
    assert shape in text
    module.write_text(text.replace(shape, "(count * 2 * weights[1].shape[1], *positions)"))
    kept = {k: v for k, v in os.environ.items() if "FORCE_DISABLE_CACHES" not in k}
    for place in (package.parent, other):
        done = subprocess.run(
            [sys.executable, "-c", GRAPH], capture_output=True, text=True, cwd=cache,
            env={**kept, "PYTHONPATH": str(place), "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert any((cache / "aotautograd").iterdir())
