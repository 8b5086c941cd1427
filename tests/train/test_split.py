"""Which labels are suspected, and when that is not to be trusted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sanm_train.reports.report import _matrix, _moves
from sanm_train.reports.split import overlap_of, split


def mixture(*components):
    """(3, 2) of components (mean, deviation, weight)."""
    return torch.tensor([[m, s * s, w] for m, s, w in components], dtype=torch.float64).T


def test_overlap_of_two_gaussians():
    normal = torch.distributions.Normal(0.0, 1.0)
    for distance in (0.0, 0.1, 0.2, 1.0):
        found = overlap_of(mixture((0.3, 0.1, 0.5), (0.3 + distance, 0.1, 0.5)))
        assert found == pytest.approx(normal.cdf(torch.tensor(-distance / 0.2)).item(), abs=1e-4)
    wide_and_narrow = mixture((0.5, 0.2, 0.8), (0.5, 1e-5, 0.2))
    assert overlap_of(wide_and_narrow) == pytest.approx(0.0, abs=1e-3)
    draws = np.random.default_rng(0)
    kind = draws.random(400_000) < 0.7
    x = np.where(kind, draws.normal(0.2, 0.1, kind.size), draws.normal(0.5, 0.3, kind.size))
    parts = [
        w / s * np.exp(-(((x - m) / s) ** 2) / 2) for m, s, w in ((0.2, 0.1, 0.7), (0.5, 0.3, 0.3))
    ]
    wrong = np.where(kind, parts[0] < parts[1], parts[0] >= parts[1]).mean()
    found = overlap_of(mixture((0.2, 0.1, 0.7), (0.5, 0.3, 0.3)))
    assert found == pytest.approx(wrong, abs=3e-3) and wrong > 0.05


def made_up(quality, given, proposed, classes=None, overlap=False, epochs=9):
    """What `split` takes, of a run that has been trained for so many epochs."""
    far = 0.1 if overlap else 0.9
    result = SimpleNamespace(
        config=SimpleNamespace(threshold=0.5, warmup=3),
        data=SimpleNamespace(num_classes=3, classes=classes),
        recipe=SimpleNamespace(
            mixtures=mixture((0.0, 0.1, 0.5), (far, 0.1, 0.5))[None], uses_quality=True
        ),
        history=[{}] * epochs,
    )
    columns = {"clean_prob": quality, "given_label": given, "proposed_label": proposed}
    return result, {name: np.array(values) for name, values in columns.items()}


@pytest.mark.parametrize("fitted", [True, False])
def test_an_unlearnt_class_is_not_called_mislabelled(fitted):
    """Of class 2 every label would be suspected and no image is predicted; of class 1 half of the
    labels are."""
    given = [0] * 20 + [1] * 20 + [2] * 20
    proposed = [0] * 20 + [1] * 10 + [0] * 30
    quality = [0.9] * 20 + [0.9] * 10 + [0.1] * 30 if fitted else [math.nan] * 60
    found = split(*made_up(quality, given, proposed, ["a", "b", "<c>"]), None)
    assert found.unlearnt.tolist() == [False, False, True]
    assert found.suspect.nonzero()[0].tolist() == list(range(30, 40))
    (warning,) = found.warnings
    assert warning.startswith("Not learnt: <c>. ")
    predicted = [0] * 20 + [1] * 10 + [0] * 10 + [2] * 5 + [0] * 15
    assert not split(*made_up(quality, given, predicted), None).unlearnt.any()


def test_a_split_that_is_not_to_be_trusted_says_so():
    given, quality = [0, 1, 2] * 20, [0.9, 0.2, 0.8] * 20
    good = split(*made_up(quality, given, given), None)
    assert not good.warnings and good.overlap < 1e-4
    assert good.overlap_in_words == "0.0% (hardly any)"
    bad = split(*made_up(quality, given, given, overlap=True), None)
    (warning,) = bad.warnings
    assert "not to be trusted" in warning and "about 31% of the labels" in warning
    assert bad.overlap_in_words == "30.9% (too many)"
    early = split(*made_up(quality, given, given, epochs=3), None)
    assert ["warm-up (3 of 3 epochs)" in text for text in early.warnings] == [True]
    each = split(*made_up(quality, given, given, overlap=True), np.array([0.0, 0.06, math.nan]))
    assert each.overlap == pytest.approx((0.06 + 0.3085) / 3, abs=1e-3)


def test_labels_given_against_proposed():
    given, proposed = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 1, 1, 1, 0, 0])
    counts = [[count for count, _ in row] for row in _matrix(given, proposed, 3)]
    assert counts == [[1, 2, 0], [0, 1, 0], [2, 0, 0]]
    assert _matrix(given, proposed, 3)[0][1][1] == pytest.approx(2 / 3)
    assert _moves(given, proposed, 3) == [(0, 1, 2), (2, 0, 2)]
    assert _matrix(given, proposed, 31) == []  # then the pairs are listed
