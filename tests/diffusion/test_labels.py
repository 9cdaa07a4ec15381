"""Labels of synthetic sets: pure functions of the seed, as even as was asked for."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sims_ray.config.labels import LabelSettings
from sims_ray.diffusion.labels import check_labels, class_of_seeds
from sims_ray.errors import SimsError

K = 10
PROBABILITIES = [0.0, 0.5, 0.2, 0.0, 0.1, 0.05, 0.05, 0.05, 0.05, 0.0]
QUOTAS = {2: 5, 0: 3, 7: 1, 9: 14}
CHOSEN: dict[str, dict[str, Any]] = {
    "uniform": {"kind": "uniform"},
    "probabilities": {"kind": "probabilities", "probabilities": PROBABILITIES},
    "quotas": {"kind": "quotas", "quotas": QUOTAS},
}


def classes(kind: str, start: int, stop: int, first_seed: int = 0) -> list[int]:
    found = class_of_seeds(CHOSEN[kind], range(start, stop), first_seed, K)
    assert found is not None and found.dtype == torch.int64
    values: list[int] = found.tolist()
    return values


@pytest.mark.parametrize("kind", CHOSEN)
@pytest.mark.parametrize("first_seed", [0, 7, 2**32 - 400])
def test_the_class_of_a_seed_does_not_depend_on_the_batch_it_is_in(kind: str, first_seed: int) -> None:
    whole = classes(kind, first_seed, first_seed + 300, first_seed)
    for start, stop in [(0, 1), (1, 2), (0, 7), (3, 250), (22, 24), (99, 300), (150, 150)]:
        assert classes(kind, first_seed + start, first_seed + stop, first_seed) == whole[start:stop]
    assert [classes(kind, seed, seed + 1, first_seed)[0] for seed in range(first_seed, first_seed + 60)] == whole[:60]


@pytest.mark.parametrize("kind", CHOSEN)
def test_asking_again_gives_the_same_whatever_was_done_to_the_answer(kind: str) -> None:
    found = class_of_seeds(CHOSEN[kind], range(230), 0, K)
    assert found is not None
    expected = found.tolist()
    found.zero_()
    assert classes(kind, 0, 230) == expected


@pytest.mark.parametrize("kind", ["uniform", "probabilities"])
def test_labels_that_are_aligned_to_seeds_do_not_depend_on_where_the_set_begins(kind: str) -> None:
    assert classes(kind, 40, 90, first_seed=33) == classes(kind, 40, 90, first_seed=0)


def test_uniform_holds_each_class_once_in_every_aligned_block() -> None:
    blocks = np.reshape(classes("uniform", 20, 2020, first_seed=3), (-1, K))
    assert (np.sort(blocks, axis=1) == np.arange(K)).all()


def test_quotas_are_exact_in_every_block_from_the_first_seed() -> None:
    total, first = sum(QUOTAS.values()), 11
    blocks = np.reshape(classes("quotas", first, first + 40 * total, first), (40, total))
    for block in blocks:
        assert dict(zip(*np.unique(block, return_counts=True), strict=True)) == QUOTAS


@pytest.mark.parametrize("kind", ["uniform", "quotas"])
def test_blocks_are_shuffled_each_in_its_own_way_and_without_preference(kind: str) -> None:
    block = K if kind == "uniform" else sum(QUOTAS.values())
    rows = np.reshape(classes(kind, 0, 4000 * block), (4000, block))
    assert len({tuple(row) for row in rows.tolist()}) > 3900
    share = np.bincount(rows[0], minlength=K) / block
    places = np.stack([(rows == label).mean(axis=0) for label in range(K)], axis=1)  # [place, label]
    sigma = np.sqrt(share * (1 - share) / 4000)
    assert (np.abs(places - share) <= 4.5 * sigma).all()


def test_sets_that_begin_elsewhere_have_their_quotas_in_another_order() -> None:
    assert classes("quotas", 0, 230, 0) != classes("quotas", 1000, 1230, 1000)


def test_probabilities_are_those_of_the_draws_and_impossible_classes_never_come() -> None:
    n = 200_000
    counts = np.bincount(classes("probabilities", 0, n), minlength=K)
    expected = np.array(PROBABILITIES)
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts / n - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_draws_with_probabilities_are_independent() -> None:
    fair = {"kind": "probabilities", "probabilities": [0.5, 0.5]}
    found = class_of_seeds(fair, range(100_000), 0, 2)
    assert found is not None
    draws = found.numpy() * 2.0 - 1
    for lag in (1, 2, 3, 4, 5, 8, 10, 16, 256):
        assert abs((draws[lag:] * draws[:-lag]).mean()) < 4.5 / np.sqrt(len(draws) - lag)


def test_kinds_draw_from_streams_of_their_own() -> None:
    even = class_of_seeds({"kind": "quotas", "quotas": dict.fromkeys(range(K), 1)}, range(500), 0, K)
    assert even is not None and even.tolist() != classes("uniform", 0, 500)


def test_labels_survive_json() -> None:
    settings = LabelSettings(kind="quotas", quotas=QUOTAS)
    plain = json.loads(json.dumps(settings.model_dump(mode="json")))
    found = class_of_seeds(plain, range(100), 0, K)
    assert found is not None and found.tolist() == classes("quotas", 0, 100)


def test_quotas_do_not_depend_on_the_order_in_which_they_are_written() -> None:
    turned = {"kind": "quotas", "quotas": dict(reversed(QUOTAS.items()))}
    found = class_of_seeds(turned, range(100), 0, K)
    assert found is not None and found.tolist() == classes("quotas", 0, 100)


def test_kind_seed_leaves_the_draw_to_the_stream_of_the_image() -> None:
    plain = LabelSettings().model_dump(mode="json")
    assert plain["kind"] == "seed"
    assert class_of_seeds(plain, range(5), 0, K) is None
    assert class_of_seeds(plain, range(5), 0, 0) is None
    assert class_of_seeds({}, range(5), 0, K) is None


@pytest.mark.parametrize("kind", CHOSEN)
def test_an_unconditional_network_has_no_labels_to_choose(kind: str) -> None:
    with pytest.raises(SimsError, match=rf"labels\.kind={kind} needs a class-conditional network.*set it to seed"):
        class_of_seeds(CHOSEN[kind], range(5), 0, 0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "probabilities", "probabilities": [0.5, 0.5]}, "has 2 values and the network 10 classes"),
        ({"kind": "quotas", "quotas": {3: 1, 10: 1}}, "names label 10; the network has labels 0 to 9"),
        ({"kind": "quotas", "quotas": {"-1": 1}}, "names label -1; the network has labels 0 to 9"),
    ],
)
def test_labels_that_the_network_does_not_know_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SimsError, match=sentence):
        check_labels(settings, K)


def test_a_seed_before_the_first_of_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="seed 4 lies before the set's first seed 5"):
        class_of_seeds(CHOSEN["quotas"], range(4, 8), 5, K)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "probabilities"}, "kind=probabilities needs probabilities"),
        ({"kind": "probabilities", "probabilities": []}, "kind=probabilities needs probabilities"),
        ({"kind": "probabilities", "probabilities": [0.5, 0.4]}, "add up to 0.9; make them add up to 1"),
        ({"kind": "probabilities", "probabilities": [1.5, -0.5]}, "greater than or equal to 0"),
        ({"kind": "probabilities", "probabilities": [float("nan"), 1]}, "finite number"),
        ({"kind": "quotas"}, "kind=quotas needs quotas"),
        ({"kind": "quotas", "quotas": {}}, "kind=quotas needs quotas"),
        ({"kind": "quotas", "quotas": {0: 0}}, "greater than or equal to 1"),
        ({"kind": "quotas", "quotas": {-1: 2}}, "greater than or equal to 0"),
        ({"kind": "uniform", "quotas": {0: 1}}, "quotas means nothing to kind=uniform"),
        ({"quotas": {0: 1}}, "quotas means nothing to kind=seed; set kind=quotas"),
        ({"kind": "random"}, "'seed', 'uniform', 'probabilities' or 'quotas'"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        LabelSettings(**settings)


def test_probabilities_may_miss_one_by_their_rounding() -> None:
    assert LabelSettings(kind="probabilities", probabilities=(0.3333333,) * 3).probabilities == (0.3333333,) * 3
