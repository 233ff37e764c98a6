"""Scores of generated digits: Inception Score and Frechet distance.

The paper (4.3) takes both in the features of a network trained on ImageNet: `inception_scores`,
which needs torch-fidelity and that network's weights. `scores` needs neither: it trains a small
classifier on the task's own labelled images, and compares runs of this project with each other
and never with the paper's.

Shapes: N images, C classes, E features.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from gram_core.config import ConfigError

FEATURES = 64
BATCH = 256
DOWNLOAD = "download"


class Classifier(nn.Module):
    """Two convolutions and two linear maps; the features are what the last map reads."""

    def __init__(self, side: int, classes: int = 10) -> None:
        super().__init__()
        self.side = side
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (side // 4) ** 2, FEATURES),
            nn.ReLU(),
        )
        self.out = nn.Linear(FEATURES, classes)

    def features(self, pixels: UInt8[Tensor, "N S"]) -> Float[Tensor, "N E"]:
        """What the classifier sees in binary images (tokens 1 black, 2 white)."""
        image = pixels.float().sub(1.5).view(-1, 1, self.side, self.side)
        seen: Tensor = self.body(image)
        return seen

    def forward(self, pixels: UInt8[Tensor, "N S"]) -> Float[Tensor, "N C"]:
        logits: Tensor = self.out(self.features(pixels))
        return logits


def train_classifier(
    pixels: UInt8[Tensor, "N S"], labels: UInt8[Tensor, " N"], side: int, steps: int, seed: int
) -> Classifier:
    """A classifier after `steps` batches of Adam."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(side)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(steps):
            rows = torch.randint(len(pixels), (BATCH,))
            loss = F.cross_entropy(model(pixels[rows]), labels[rows].long())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class Seen:
    """Features and class probabilities of some images, float64."""

    features: np.ndarray  # [N, E]
    probabilities: np.ndarray  # [N, C]


@torch.inference_mode()
def look(model: Classifier, pixels: UInt8[Tensor, "N S"]) -> Seen:
    """What the classifier makes of images."""
    features = torch.cat([model.features(part) for part in torch.split(pixels, 4096)]).double()
    logits = features @ model.out.weight.double().T + model.out.bias.double()
    return Seen(features.numpy(), logits.softmax(-1).numpy())


def scores(
    generated: UInt8[Tensor, "G S"],
    train: tuple[UInt8[Tensor, "N S"], UInt8[Tensor, " N"]],
    test: tuple[UInt8[Tensor, "M S"], UInt8[Tensor, " M"]],
    side: int,
    *,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """`classifier_score` (Inception Score) and `classifier_distance` (Frechet distance to the
    training images) of generated images; `..._real` are the same of the test images, and
    `classifier_accuracy` is on the test images. A Frechet distance is larger for fewer images:
    where G and M differ, the two distances are not on one scale; of one image there is none."""
    model = train_classifier(*train, side, steps, seed)
    made, real, held_out = (look(model, part) for part in (generated, train[0], test[0]))
    right = held_out.probabilities.argmax(1) == test[1].numpy()
    found = {}
    for suffix, seen in (("", made), ("_real", held_out)):
        found[f"classifier_score{suffix}"] = inception_score(seen.probabilities)
        if min(len(seen.features), len(real.features)) > 1:
            found[f"classifier_distance{suffix}"] = frechet_distance(seen.features, real.features)
    return {**found, "classifier_accuracy": float(right.mean())}


def inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean KL(p(c | image) || p(c)), from 1 to the number of classes."""
    p = np.clip(probabilities, 1e-12, 1)
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
    return float(np.exp(divergence.mean()))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to two sets of features [N, E]:
    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))."""
    gap = first.mean(0) - second.mean(0)
    s1, s2 = (np.atleast_2d(np.cov(part, rowvar=False)) for part in (first, second))
    # (S1 S2)^(1/2) has the trace of (R S2 R)^(1/2) with R = S1^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ s2 @ root)
    trace = np.trace(s1) + np.trace(s2) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(gap @ gap + trace)


class _Pictures(torch.utils.data.Dataset[Tensor]):
    """Binary images as the three-channel bytes that torch-fidelity reads."""

    def __init__(self, pixels: UInt8[Tensor, "N S"], side: int) -> None:
        self.pixels = pixels.view(-1, 1, side, side)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> UInt8[Tensor, "3 H W"]:
        return ((self.pixels[row] == 2).to(torch.uint8) * 255).expand(3, -1, -1)


def inception_scores(
    generated: UInt8[Tensor, "G S"], reference: UInt8[Tensor, "N S"], side: int, weights: str
) -> dict[str, float]:
    """`inception_score` and `inception_distance` (FID against `reference`) by torch-fidelity in the
    features of Inception-v3; `weights` is `download` or a file of its weights.

    The paper's reference are the grey images; ours are the binarised ones, since those are what
    a perfect generator would make. Raises `ConfigError` where the package or weights are missing.
    """
    try:
        import torch_fidelity
    except ImportError:
        raise ConfigError(
            "evaluate.inception: needs the package torch-fidelity; pip install -e '.[images]'"
        ) from None
    if weights != DOWNLOAD and not Path(weights).is_file():
        raise ConfigError(f"evaluate.inception: {weights}: no such file; use a file or {DOWNLOAD}")
    try:
        found = torch_fidelity.calculate_metrics(
            input1=_Pictures(generated, side),
            input2=_Pictures(reference, side),
            isc=True,
            fid=True,
            cuda=torch.cuda.is_available(),
            verbose=False,
            feature_extractor_weights_path=None if weights == DOWNLOAD else weights,
        )
    except OSError as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"evaluate.inception: no weights to be had ({reason})") from None
    return {
        "inception_score": float(found["inception_score_mean"]),
        "inception_distance": float(found["frechet_inception_distance"]),
    }
