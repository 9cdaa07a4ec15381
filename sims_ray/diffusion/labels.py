"""Which class each image of a synthetic set is conditioned on: a pure function of the image's seed.

The classes come from counter-based streams of their own, so that an image's noise does not depend on how the labels
were chosen. Seed `s` of a stream is its word number `s`; a shuffled block is the order of its words by size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sims_ray.errors import SimsError

SALTS = {"uniform": 0x756E69, "probabilities": 0x70726F62, "quotas": 0x71756F}  # one stream per kind
WORDS_PER_STEP = 4  # a step of Philox's counter makes four words of 64 bits


def class_of_seeds(settings: Mapping[str, Any], seeds: range, first_seed: int, num_classes: int) -> Tensor | None:
    """Classes of consecutive seeds.

    Args:
        settings: `kind`, and what belongs to it: 'uniform' holds each class once in every block of K seeds (the
            blocks begin at multiples of K), in a shuffled order; 'probabilities' draws each class on its own with
            `probabilities`; 'quotas' holds exactly the counts of `quotas` ({label: count}) in every block of as many
            seeds as these add up to, counted from `first_seed`, in a shuffled order; 'seed' leaves the draw to the
            image's own stream.
        seeds: consecutive seeds.
        first_seed: first seed of the whole set.
        num_classes: K; 0 for an unconditional network.

    Returns:
        int64 [N]; None for kind 'seed'.

    Raises:
        SimsError: the settings do not fit the network.
        ValueError: a seed lies before the set's first.
    """
    check_labels(settings, num_classes)
    if seeds.start < first_seed:
        raise ValueError(f"seed {seeds.start} lies before the set's first seed {first_seed}; begin there")
    kind = settings.get("kind", "seed")
    if kind == "seed":
        return None
    if kind == "probabilities":
        cumulative = np.cumsum(np.asarray(settings["probabilities"], np.float64))
        uniform = (_words((SALTS[kind], 0), seeds) >> np.uint64(11)) * 2.0**-53  # [0, 1)
        return torch.from_numpy(np.searchsorted(cumulative / cumulative[-1], uniform, side="right"))
    if kind == "uniform":
        return torch.from_numpy(_shuffled((SALTS[kind], 0), num_classes, seeds))
    counts = _counts(settings["quotas"])
    classes = np.repeat(np.asarray(list(counts), np.int64), list(counts.values()))
    relative = range(seeds.start - first_seed, seeds.stop - first_seed)
    # Sets that begin elsewhere are shuffled otherwise.
    return torch.from_numpy(classes[_shuffled((SALTS[kind], first_seed), len(classes), relative)])


def check_labels(settings: Mapping[str, Any], num_classes: int) -> None:
    """Check that a network with K classes can be asked for these labels.

    Raises:
        SimsError: it cannot.
    """
    kind = settings.get("kind", "seed")
    if kind == "seed":
        return
    if not num_classes:
        raise SimsError(f"labels.kind={kind} needs a class-conditional network and this one has none; set it to seed")
    if kind == "probabilities" and (given := len(settings["probabilities"])) != num_classes:
        raise SimsError(f"labels.probabilities has {given} values and the network {num_classes} classes; give as many")
    if kind == "quotas":
        wrong = [label for label in _counts(settings["quotas"]) if not 0 <= label < num_classes]
        if wrong:
            raise SimsError(f"labels.quotas names label {wrong[0]}; the network has labels 0 to {num_classes - 1}")


def _counts(quotas: Mapping[Any, int]) -> dict[int, int]:
    """Counts by label, in the order of the labels; JSON makes strings of the labels."""
    return dict(sorted((int(label), count) for label, count in quotas.items()))


def _words(key: tuple[int, int], places: range) -> NDArray[np.uint64]:
    """Words [places.start, places.stop) of a stream: uint64 [N]."""
    first, skipped = divmod(places.start, WORDS_PER_STEP)
    stream = np.random.Philox(key=np.array(key, np.uint64)).advance(first)
    return np.asarray(stream.random_raw(skipped + len(places)))[skipped:]


def _shuffled(key: tuple[int, int], block: int, places: range) -> NDArray[np.int64]:
    """For each place, what a shuffle of [0, block) puts there; every aligned block is shuffled on its own."""
    first, stop = places.start // block, -(-places.stop // block)
    within = slice(places.start - first * block, places.stop - first * block)
    return _orders(key, block, first, stop)[within].copy()


@lru_cache(maxsize=4)  # a set is sampled in batches, many of which may lie in one block
def _orders(key: tuple[int, int], block: int, first: int, stop: int) -> NDArray[np.int64]:
    words = _words(key, range(first * block, stop * block)).reshape(-1, block)
    return np.argsort(words, axis=1, kind="stable").reshape(-1)
