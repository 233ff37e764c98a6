"""Binarised digits (paper, 4.3 and Table 5): generate images from nothing.

MNIST from its IDX files, or the 8x8 digits that scikit-learn carries. A pixel above half of the
largest intensity is white. Tokens are pixels, row-major: 0 padding, 1 black, 2 white. The input is
all black; a model reads it in patches (`image`). An image is neither right nor wrong: how good
generated ones are is a matter of scores (docs/evaluation.md). `group_id` holds each image's label
and number, `7/123`.

Shapes: N images, S = height * width pixels.
"""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, UInt8
from torch import Tensor

from gram_core.config import Config, PositiveInt, Seed
from gram_core.tables import dataset_schema, tokens_array
from gram_core.tasks.base import Fetch, Split, Task, TaskError

BLACK, WHITE = 1, 2
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# MD5 of the original files, which say that a download is whole, no more.
FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
Images = tuple[np.ndarray, np.ndarray]  # intensities uint8 [N, height, width], labels uint8 [N]


class Mnist(Config, frozen=True, kw_only=True, tag="mnist", tag_field="kind"):
    """The original files by their known names and checksums, from a mirror, a folder or s3://.
    Without `test_files` the last 10,000 training images are held out."""

    root: str = MIRROR
    test_files: bool = True


class Idx(Config, frozen=True, kw_only=True, tag="idx", tag_field="kind"):
    """Other IDX files, gzip or not; the last `held_out` images are the test images."""

    images: str
    labels: str
    held_out: PositiveInt = 10_000


class Small(Config, frozen=True, kw_only=True, tag="sklearn", tag_field="kind"):
    """The 1,797 digits of 8x8 pixels that scikit-learn carries; the last `held_out` are the test
    images."""

    held_out: PositiveInt = 297


class DigitsConfig(Config, frozen=True, kw_only=True, tag="digits", tag_field="kind"):
    """Where images come from, their side, and the side of the patches that are the positions."""

    source: Mnist | Idx | Small = Mnist()
    side: PositiveInt = 28
    patch: PositiveInt = 2
    train: PositiveInt | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.side < 4:
            raise ValueError(f"side {self.side}: evaluation's classifier wants 4 pixels or more")
        if self.side % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the side {self.side}")


def read_idx(path: Path, name: str, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file. Raises `TaskError` for a truncated gzip, a wrong magic
    number or a wrong length."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{name}: not a whole gzip file ({error})") from None
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise TaskError(
            f"{name}: starts with {content[:4].hex()}, an IDX file of bytes with {dimensions} "
            f"dimension{'s' * (dimensions > 1)} with {magic.hex()}"
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise TaskError(f"{name}: {len(content)} bytes, the header alone promises {header}")
    shape = np.frombuffer(content[4:header], dtype=">u4").tolist()
    if len(content) != header + math.prod(shape):
        raise TaskError(f"{name}: {len(content)} bytes are not the {shape} it promises")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def check_md5(path: Path, name: str, wanted: str) -> Path:
    """`path`, where its content has the checksum. Raises `TaskError`."""
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != wanted:
        raise TaskError(
            f"{name}: MD5 {found}, the original has {wanted}; remove {path} to fetch it again"
        )
    return path


class Digits(Task):
    """The unconditional task of generating digits."""

    vocab = 3
    conditional = False
    verifies = False

    def __init__(self, config: DigitsConfig) -> None:
        self.config: DigitsConfig = config
        self.length = config.side**2
        self.image = (config.side, config.side, config.patch)

    def generate(self, fetch: Fetch) -> Split:
        """The binarised images. Raises `TaskError`."""
        train, test = self._read(fetch)
        wanted = self.config.train
        if wanted is not None:
            if wanted > len(train[0]):
                raise TaskError(f"train: {wanted} images asked for, there are {len(train[0])}")
            rng = np.random.default_rng(self.config.seed)
            rows = np.sort(rng.choice(len(train[0]), wanted, replace=False))
            train = (train[0][rows], train[1][rows])
        for images, _ in (train, test):
            if images.shape[1:] != (self.config.side, self.config.side):
                raise TaskError(
                    f"images have {images.shape[1]}x{images.shape[2]} pixels, the task's side is "
                    f"{self.config.side}"
                )
        metadata = {"train_targets": len(train[0]), "test_targets": len(test[0])}
        return Split(self._table(*train), self._table(*test), metadata)

    def _read(self, fetch: Fetch) -> tuple[Images, Images]:
        source = self.config.source
        if isinstance(source, Small):
            from sklearn.datasets import load_digits

            bundle = load_digits()
            intensity = (bundle.images * (255 / 16)).astype(np.uint8)
            return _cut((intensity, bundle.target.astype(np.uint8)), source.held_out, "digits")
        if isinstance(source, Idx):
            return _cut(_pair(fetch, source.images, source.labels), source.held_out, source.images)

        def part(prefix: str) -> Images:
            names = [f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"]
            paths = [source.root.rstrip("/") + "/" + name for name in names]

            def checked(path: str) -> Path:
                return check_md5(fetch(path), path, FILES[path.rpartition("/")[2]])

            return _pair(checked, *paths)

        if source.test_files:
            return part("train"), part("t10k")
        return _cut(part("train"), 10_000, source.root)

    def _table(self, images: np.ndarray, labels: np.ndarray) -> pa.Table:
        count = len(images)
        white = images.reshape(count, -1) > 127
        return pa.table(
            {
                "puzzle_id": ["blank"] * count,
                "inputs": tokens_array(np.full((count, self.length), BLACK, np.uint8)),
                "target": tokens_array(np.where(white, WHITE, BLACK).astype(np.uint8)),
                "solution_count": pa.array([0] * count, pa.uint32()),
                "group_id": [f"{label}/{number}" for number, label in enumerate(labels)],
                "augmentation": [""] * count,
            },
            schema=dataset_schema(self.length, self.length),
        )

    def verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        """No image is wrong: whether every pixel is black or white."""
        return (answers >= BLACK).all(-1)

    def parse(self, text: str) -> np.ndarray:
        """The empty input, typed as nothing or as the word `blank`."""
        if text.strip() not in ("", "blank"):
            raise TaskError("this task makes images from nothing; give the puzzle as: blank")
        return np.full(self.length, BLACK, dtype=np.uint8)

    def render(self, tokens: np.ndarray) -> str:
        """One line a row: `#` white, `.` black, `?` padding."""
        signs = np.array(list("?.#"))[np.asarray(tokens)]
        return "\n".join("".join(row) for row in signs.reshape(self.config.side, -1))


def _pair(fetch: Fetch, images: str, labels: str) -> Images:
    """Images and labels of two IDX files. Raises `TaskError`."""
    pixels = read_idx(fetch(images), images, 3)
    digits = read_idx(fetch(labels), labels, 1)
    if len(pixels) != len(digits):
        raise TaskError(f"{labels}: {len(digits)} labels for {len(pixels)} images")
    if not len(pixels) or digits.max() > 9:
        raise TaskError(f"{labels}: labels must be digits 0-9, and there must be one")
    return pixels, digits


def _cut(images: Images, held_out: int, name: str) -> tuple[Images, Images]:
    """All but the last `held_out` images, and those. Raises `TaskError`."""
    pixels, labels = images
    if held_out >= len(pixels):
        raise TaskError(f"{name}: {held_out} of {len(pixels)} images held out leaves none to train")
    return (pixels[:-held_out], labels[:-held_out]), (pixels[-held_out:], labels[-held_out:])
