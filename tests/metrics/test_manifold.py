import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sims_ray.metrics import neighbours
from sims_ray.metrics.manifold import manifold_scores

GOLDEN = Path(__file__).parents[1] / "golden"
Array = NDArray[np.float64]


def normal(n: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(n, 5))


@pytest.mark.parametrize("block", [37, 2048])
@pytest.mark.parametrize("k", [3, 5])
def test_scores_of_the_reference_features_are_the_reference_numbers(
    k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    arrays = np.load(GOLDEN / "metrics.npz")
    expected = json.loads((GOLDEN / "metrics.json").read_text())[f"prdc_k{k}"]
    scores = manifold_scores(arrays["real"], arrays["fake"], k)
    n, m = len(arrays["real"]), len(arrays["fake"])
    # As counts: exact, whatever the last bit of a quotient.
    assert round(scores.precision * m) == expected["precision"] * m
    assert round(scores.recall * n) == expected["recall"] * n
    assert round(scores.coverage * n) == expected["coverage"] * n
    assert scores.density == pytest.approx(expected["density"], rel=1e-15)
    assert scores.k == k


def test_a_set_against_itself_is_precise_and_complete() -> None:
    real = normal(80, 0)
    scores = manifold_scores(real, real, 4)
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)
    # Each closed ball holds its centre and exactly k others: ties at the radius count.
    assert scores.density == 5 / 4


def test_sets_far_apart_share_nothing() -> None:
    scores = manifold_scores(normal(50, 0), normal(40, 1) + 1000, 3)
    assert (scores.precision, scores.recall, scores.density, scores.coverage) == (0, 0, 0, 0)


def test_precision_and_recall_change_places_with_the_sets() -> None:
    a, b = normal(70, 0), normal(50, 1) * 0.5
    one, other = manifold_scores(a, b, 3), manifold_scores(b, a, 3)
    assert one.precision == other.recall and one.recall == other.precision
    assert one.precision > one.recall


def test_one_mode_of_two_is_precise_but_covers_half() -> None:
    left, right = normal(60, 0) - 50, normal(60, 1) + 50
    scores = manifold_scores(np.vstack([left, right]), left, 3)
    assert scores.precision == 1 and scores.recall == 0.5 and scores.coverage == 0.5


def test_one_outlying_real_image_lifts_precision_but_not_density() -> None:
    real, fake = normal(100, 0), normal(100, 1) + 40
    with_outlier = np.vstack([real, [[40.0] * 5]])
    assert manifold_scores(real, fake, 3).precision == 0
    scores = manifold_scores(with_outlier, fake, 3)
    assert scores.precision == 1 and scores.density == pytest.approx(1 / 3)
    assert scores.coverage == 1 / 101


def test_too_few_images_for_k_are_refused() -> None:
    with pytest.raises(ValueError, match="give at least 6"):
        manifold_scores(normal(5, 0), normal(50, 1), 5)
