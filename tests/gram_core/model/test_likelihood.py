import math

import pytest
import torch
from torch.nn import functional as F

from gram_core.model.likelihood import token_accuracy, token_cross_entropy


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    target = torch.tensor([[1, 2, 0, 0], [2, 2, 1, 1], [0, 0, 0, 0]], dtype=torch.uint8)
    return 2 * torch.randn(3, 4, 3), target


def test_softmax_is_cross_entropy_over_the_tokens_that_are_not_padding():
    logits, target = batch()
    expected = [
        F.cross_entropy(row[labels != 0], labels[labels != 0].long())
        for row, labels in zip(logits[:2], target[:2], strict=True)
    ]
    result = token_cross_entropy(logits, target, "softmax")
    torch.testing.assert_close(result[:2], torch.stack(expected))
    assert result[2] == 0, "an example without tokens to score costs nothing"


def test_stablemax_is_its_definition():
    logits, target = batch()

    def s(x: float) -> float:
        return x + 1 if x >= 0 else 1 / (1 - x)

    for row in (0, 1):
        terms = []
        for scores, label in zip(logits[row].tolist(), target[row].tolist(), strict=True):
            if label:
                terms.append(-math.log(s(scores[label]) / sum(map(s, scores))))
        result = token_cross_entropy(logits, target, "stablemax")[row]
        assert float(result) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "stablemax"])
def test_each_kind_is_a_likelihood(kind):
    logits = torch.randn(1, 1, 4)
    # With label 0 unscored, shift labels by one and give token 0 no mass worth naming.
    logits[..., 0] = -1e9
    total = sum(
        math.exp(-float(token_cross_entropy(logits, torch.tensor([[y]]).byte(), kind)))
        for y in (1, 2, 3)
    )
    assert total == pytest.approx(1.0, abs=1e-5)


def test_stablemax_has_finite_gradients_far_from_zero():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    token_cross_entropy(logits, torch.tensor([[2]]).byte(), "stablemax").sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_token_accuracy_is_the_share_of_scored_tokens_that_are_right():
    _, target = batch()
    prediction = torch.tensor([[1, 1, 1, 1], [2, 2, 1, 2], [1, 1, 1, 1]], dtype=torch.uint8)
    assert token_accuracy(prediction, target).tolist() == [0.5, 0.75, 0.0]
