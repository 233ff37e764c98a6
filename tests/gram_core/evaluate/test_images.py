"""Scores of images against closed forms and scipy."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits

from gram_core.config import ConfigError
from gram_core.evaluate.images import (
    frechet_distance,
    inception_score,
    inception_scores,
    look,
    scores,
    train_classifier,
)


def test_inception_score_of_known_predictions() -> None:
    assert inception_score(np.full((50, 10), 0.1)) == pytest.approx(1.0)
    assert inception_score(np.eye(10)[np.arange(100) % 10]) == pytest.approx(10.0, rel=1e-6)
    # All of one class: sure, but without variety.
    assert inception_score(np.eye(10)[np.zeros(30, int)]) == pytest.approx(1.0)
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    m = p.mean(0)
    wanted = np.exp((p * np.log(p / m)).sum(1).mean())
    assert inception_score(p) == pytest.approx(wanted)


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 5)), rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 1
    gap = a.mean(0) - b.mean(0)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = gap @ gap + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + 3.0) == pytest.approx(45.0)
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2.
    x, y = rng.normal(size=(500, 1)), 2 + 3 * rng.normal(size=(500, 1))
    wanted = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet_distance(x, y) == pytest.approx(wanted)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    bundle = load_digits()
    pixels = torch.from_numpy(1 + (bundle.images.reshape(-1, 64) > 8).astype(np.uint8))
    return pixels, torch.from_numpy(bundle.target.astype(np.uint8))


def test_real_digits_score_better_than_noise(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels, labels = digits
    train, test = (pixels[:1400], labels[:1400]), (pixels[1400:], labels[1400:])
    noise = torch.randint(1, 3, (397, 64), dtype=torch.uint8)
    made = scores(noise, train, test, 8, steps=150, seed=0)
    assert made["classifier_accuracy"] > 0.85
    assert made["classifier_score_real"] > 6
    assert made["classifier_score"] < made["classifier_score_real"]
    assert made["classifier_distance"] > 3 * made["classifier_distance_real"]
    again = scores(noise, train, test, 8, steps=150, seed=0)
    assert made == again


def test_one_image_has_no_distance(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels, labels = digits
    some, one = (pixels[:200], labels[:200]), (pixels[200:201], labels[200:201])
    for generated, train, test, distances in (
        (one[0], some, some, {"classifier_distance_real"}),
        (some[0], some, one, {"classifier_distance"}),
        (some[0], one, some, set()),
    ):
        found = scores(generated, train, test, 8, steps=2, seed=0)
        assert {name for name in found if "distance" in name} == distances
        assert all(map(math.isfinite, found.values()))


def test_training_the_classifier_leaves_the_random_state_alone(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    model = train_classifier(digits[0][:100], digits[1][:100], 8, 2, 0)
    assert (torch.rand(3) == wanted).all()
    seen = look(model, digits[0][:10])
    np.testing.assert_allclose(
        seen.probabilities, model(digits[0][:10]).softmax(-1).detach().numpy(), atol=1e-5
    )


def test_inception_reads_the_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The network itself and its weights are torch-fidelity's; what it is given is ours."""
    asked: dict[str, Any] = {}

    def calculate(**settings: Any) -> dict[str, float]:
        asked.update(settings)
        return {"inception_score_mean": 2.0, "frechet_inception_distance": 70.0}

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=calculate))
    pixels = torch.tensor([[1, 2, 2, 1], [1, 1, 1, 2]], dtype=torch.uint8)
    weights = tmp_path / "weights.pth"
    weights.touch()
    found = inception_scores(pixels, pixels[:1], 2, str(weights))
    assert found == {"inception_score": 2.0, "inception_distance": 70.0}
    assert [len(asked[name]) for name in ("input1", "input2")] == [2, 1]
    assert asked["input1"][0].tolist() == [[[0, 255], [255, 0]]] * 3
    assert asked["feature_extractor_weights_path"] == str(weights)
    inception_scores(pixels, pixels, 2, "download")
    assert asked["feature_extractor_weights_path"] is None
    with pytest.raises(ConfigError, match="nowhere: no such file"):
        inception_scores(pixels, pixels, 2, "nowhere")

    def refuse(**settings: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(sys.modules["torch_fidelity"], "calculate_metrics", refuse)
    with pytest.raises(ConfigError, match=r"no weights to be had \(no network\)"):
        inception_scores(pixels, pixels, 2, "download")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match="needs the package torch-fidelity"):
        inception_scores(pixels, pixels, 2, "download")
