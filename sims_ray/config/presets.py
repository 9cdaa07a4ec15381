"""The published models: recipe, shape of the data, and what the papers report for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

PRESETS_FILE = "presets.yaml"


@dataclass(frozen=True)
class Preset:
    """One published model.

    Attributes:
        name: like `edm-cifar10-vp`.
        recipe: its settings, as a recipe's YAML has them.
        dataset: what it was trained on.
        shape: (C, H, W) of the images or latents.
        num_classes: K, also where the model is not conditional.
        published: scores and sizes as reported, with `params_m` in millions and `fid`.
    """

    name: str
    recipe: dict[str, Any]
    dataset: str
    shape: tuple[int, int, int]
    num_classes: int
    published: dict[str, Any]


def presets() -> dict[str, Preset]:
    """The published models by name."""
    return copy.deepcopy(_presets())


@cache
def _presets() -> dict[str, Preset]:
    text = (resources.files("sims_ray") / "recipes" / PRESETS_FILE).read_text()
    found = {}
    for name, entry in yaml.safe_load(text)["presets"].items():
        facts = {key: entry.pop(key) for key in ("dataset", "shape", "num_classes", "published")}
        facts["shape"] = tuple(facts["shape"])
        found[name] = Preset(name, {"name": name, **entry}, **facts)
    return found
