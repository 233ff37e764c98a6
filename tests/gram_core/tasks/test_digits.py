"""Digits: IDX files, binarisation, sources and what is refused."""

import gzip
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gram_core import tables
from gram_core.config import ConfigError
from gram_core.tasks import digits
from gram_core.tasks.base import TaskError
from gram_core.tasks.digits import Digits, read_idx
from gram_core.tasks.registry import make_task

SHARED = Path(__file__).parents[4] / "shared" / "data" / "mnist"


def task_of(**settings: Any) -> Digits:
    task = make_task({"kind": "digits", **settings}, "task")
    assert isinstance(task, Digits)
    return task


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 6, 6)).astype(np.uint8)
    labels = rng.integers(0, 10, 30).astype(np.uint8)
    (tmp_path / "images").write_bytes(idx(images))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx(labels)))
    source = {
        "kind": "idx",
        "images": str(tmp_path / "images"),
        "labels": str(tmp_path / "labels.gz"),
        "held_out": 10,
    }
    return {"images": images, "labels": labels, "source": source}


def test_pixels_above_half_are_white_and_the_last_images_are_held_out(
    files: dict[str, Any],
) -> None:
    split = task_of(source=files["source"], side=6, patch=3).generate(Path)
    images, labels = files["images"], files["labels"]
    for part, rows in ((split.train, slice(0, 20)), (split.test, slice(20, 30))):
        target = tables.tokens_numpy(part["target"])
        assert (target == 1 + (images[rows].reshape(-1, 36) / 255 > 0.5)).all()
        assert (tables.tokens_numpy(part["inputs"]) == 1).all()
        got = [int(group.split("/")[0]) for group in part["group_id"].to_pylist()]
        assert got == labels[rows].tolist()
    assert split.metadata == {"train_targets": 20, "test_targets": 10}


def test_a_part_of_the_training_images_can_be_drawn(files: dict[str, Any]) -> None:
    made = task_of(source=files["source"], side=6, train=7, seed=3).generate(Path)
    whole = task_of(source=files["source"], side=6).generate(Path)
    rows = tables.tokens_numpy(whole.train["target"]).tolist()
    drawn = tables.tokens_numpy(made.train["target"]).tolist()
    assert len(drawn) == 7
    assert all(row in rows for row in drawn)
    with pytest.raises(TaskError, match="21 images asked for, there are 20"):
        task_of(source=files["source"], side=6, train=21).generate(Path)


def test_the_small_digits_need_no_file() -> None:
    split = task_of(source={"kind": "sklearn"}, side=8).generate(Path)
    assert (len(split.train), len(split.test)) == (1500, 297)
    target = tables.tokens_numpy(split.train["target"])
    assert set(np.unique(target)) == {1, 2}
    assert 0.2 < (target == 2).mean() < 0.45


def test_the_mirror_is_asked_for_files_of_known_checksum(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    contents = {"images": idx(files["images"]), "labels": idx(files["labels"])}

    def fetch(source: str) -> Path:
        asked.append(source)
        path = tmp_path / source.rpartition("/")[2]
        path.write_bytes(contents["images" if "images" in source else "labels"])
        return path

    with pytest.raises(TaskError, match="MD5"):
        task_of(side=6).generate(fetch)
    monkeypatch.setattr(
        digits,
        "FILES",
        {
            name: hashlib.md5(contents["images" if "images" in name else "labels"]).hexdigest()
            for name in digits.FILES
        },
    )
    asked.clear()
    split = task_of(side=6).generate(fetch)
    assert asked == [digits.MIRROR + name for name in digits.FILES]
    assert len(split.train) == len(split.test) == 30


NOISE = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (5, 6, 6))), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b" + b"x" * 40, "gzip"),
        (gzip.compress(idx(np.zeros((5, 6, 6))), mtime=0)[:-9], "gzip"),
        (NOISE[:20] + bytes(40) + NOISE[60:], "gzip"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4), "promises"),
        (struct.pack(">BBBB3I", 0, 0, 9, 3, 1, 6, 6) + b"\0" * 36, "00000903"),
        (idx(np.zeros((5, 6, 6)))[:-1], r"promises"),
        (idx(np.zeros((5, 6, 6)))[:9], r"promises"),
        (b"", "starts with"),
    ],
    ids=[
        "not gzip",
        "cut gzip",
        "damaged gzip",
        "2^64 bytes",
        "other magic",
        "a byte short",
        "cut header",
        "empty",
    ],
)
def test_damaged_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad-images"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=message) as error:
        read_idx(path, path.name, 3)
    assert "bad-images" in str(error.value)


def test_what_does_not_fit_is_refused(files: dict[str, Any], tmp_path: Path) -> None:
    source = files["source"]
    few = tmp_path / "few"
    few.write_bytes(idx(np.zeros(29)))
    odd = tmp_path / "odd"
    odd.write_bytes(idx(np.full(30, 10)))
    for settings, message in (
        ({"source": source, "side": 8}, "6x6 pixels"),
        ({"source": {**source, "labels": str(few)}, "side": 6}, "29 labels for 30"),
        ({"source": {**source, "labels": str(odd)}, "side": 6}, "digits 0-9"),
        ({"source": {**source, "held_out": 30}, "side": 6}, "leaves none"),
    ):
        with pytest.raises(TaskError, match=message):
            task_of(**settings).generate(Path)
    with pytest.raises(ConfigError, match="patch 4 does not divide"):
        task_of(side=6, patch=4)


def test_parse_render_and_verify() -> None:
    task = task_of(source={"kind": "sklearn"}, side=8)
    blank = task.parse("blank")
    assert task.render(blank) == "\n".join(["........"] * 8)
    with pytest.raises(TaskError, match="blank"):
        task.parse("7")
    answer = torch.from_numpy(blank)[None]
    assert task.verify(answer, answer).all()
    assert not task.verify(answer, torch.zeros_like(answer)).any()
    assert task.shape.positions == 16


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data files are not here")
def test_the_real_training_files() -> None:
    source = {"kind": "mnist", "root": str(SHARED), "test_files": False}
    split = task_of(source=source).generate(Path)
    assert (len(split.train), len(split.test)) == (50_000, 10_000)
    labels = [group.split("/")[0] for group in split.test["group_id"].to_pylist()]
    assert np.bincount(np.array(labels, int), minlength=10).min() > 800
