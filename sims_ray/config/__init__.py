"""Every setting, and the recipes that are made of them.

`load_recipe("digits", ["finetune.lr=1e-3"])` is the one way in; a wrong key, type or range stops here,
before any work, with its dotted name.
"""

from sims_ray.config.base import SEED_LIMIT
from sims_ray.config.evaluation import EvaluateSettings, FeatureSettings
from sims_ray.config.loading import builtin_recipes, load_recipe, preset_network
from sims_ray.config.presets import Preset, presets
from sims_ray.config.sampling import GuidanceSettings, SamplerSettings
from sims_ray.config.search import TuneSettings
from sims_ray.config.settings import ComputeSettings, Recipe, TrackingSettings
from sims_ray.config.training import FinetuneSettings, NetworkSettings, OptimizerSettings, TrainSettings

__all__ = [
    "SEED_LIMIT",
    "ComputeSettings",
    "EvaluateSettings",
    "FeatureSettings",
    "FinetuneSettings",
    "GuidanceSettings",
    "NetworkSettings",
    "OptimizerSettings",
    "Preset",
    "Recipe",
    "SamplerSettings",
    "TrackingSettings",
    "TrainSettings",
    "TuneSettings",
    "builtin_recipes",
    "load_recipe",
    "preset_network",
    "presets",
]
