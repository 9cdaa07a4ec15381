"""Settings of the published methods: what does not fit is refused, and presets do not share state."""

from typing import Any, Literal

import pytest

from sims_ray.config import NetworkSettings, builtin_recipes, load_recipe, presets
from sims_ray.config.architecture import network_entry
from sims_ray.errors import SimsError

EDM2 = "network.architecture=edm2"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # networks
        (["network.architecture=unet"], ["network.architecture='unet'", "'ddpmpp', 'ncsnpp', 'adm' or 'edm2'"]),
        (["network.channels_per_head=0"], ["network.channels_per_head=0", "greater than or equal to 1"]),
        (["network.sigma_data=0"], ["network.sigma_data=0", "greater than 0"]),
        (["network.label_dropout=1"], ["network.label_dropout=1", "less than 1"]),
        (["network.precision=int8"], ["network.precision='int8'", "'float32', 'bfloat16' or 'float16'"]),
        (["compute.precision=half"], ["compute.precision='half'", "'auto', 'float32', 'bfloat16' or 'float16'"]),
        # augmentation
        (
            [EDM2, "network.channels_per_head=8", "train.augment=0.12"],
            ["train.augment=0.12: edm2 is not told augmentations; set it to 0"],
        ),
        ([EDM2, "network.channels_per_head=8", "finetune.augment=0.1"], ["finetune.augment=0.1: edm2"]),
        (["train.augment=1"], ["train.augment=1", "less than 1"]),
        # averages
        (["train.ema_stds=[0.1,0.05,0.1]"], ["train.ema_stds=[0.1, 0.05, 0.1] must not repeat a width"]),
        (["finetune.ema_stds=[0.1,0.1]"], ["finetune.ema_stds=[0.1, 0.1] must not repeat a width"]),
        (["train.ema_stds=[0.05,0.3]"], ["train.ema_stds.1=0.3", "less than or equal to 0.28"]),
        (["train.ema_std=0"], ["train.ema_std=0", "greater than 0"]),
        (["finetune.ema_std=0.29"], ["finetune.ema_std=0.29", "less than or equal to 0.28"]),
        # optimisation
        (["train.lr_decay_kimg=-1"], ["train.lr_decay_kimg=-1", "greater than or equal to 0"]),
        (["train.adam_beta2=1"], ["train.adam_beta2=1", "less than 1"]),
        (["train.loss_scale=0"], ["train.loss_scale=0", "greater than 0"]),
        (["train.gradient_limit=-1"], ["train.gradient_limit=-1", "greater than or equal to 0"]),
        (["finetune.trainable=encoder"], ["finetune.trainable='encoder'", "'all' or 'decoder'"]),
        (["train.trainable=decoder"], ["train.trainable is not a setting"]),
        # sampling
        (["sampler.solver=rk4"], ["sampler.solver='rk4'", "'heun', 'euler', 'ddim' or 'ddpm'"]),
        (
            ["sampler.solver=ddim", "sampler.S_churn=40"],
            ["sampler.S_churn=40 means nothing to solver=ddim; set it to 0"],
        ),
        (["sampler.solver=ddpm", "sampler.S_churn=1"], ["sampler.S_churn=1 means nothing to solver=ddpm"]),
        (["sampler.S_min=2", "sampler.S_max=1"], ["sampler.S_min=2 must not exceed S_max=1"]),
        (["sampler.state_dtype=float16"], ["sampler.state_dtype='float16'", "'float64' or 'float32'"]),
        # guidance
        (["guidance.sigma_lo=3", "guidance.sigma_hi=3"], ["guidance.sigma_lo=3 must be below sigma_hi=3"]),
        (["guidance.sigma_lo=5", "guidance.sigma_hi=0.5"], ["guidance.sigma_lo=5 must be below sigma_hi=0.5"]),
        (["guidance.sigma_hi=0"], ["guidance.sigma_hi=0", "greater than 0"]),
    ],
)
def test_settings_of_a_method_that_do_not_fit_give_one_sentence_with_name_value_and_remedy(
    overrides: list[str], said: list[str]
) -> None:
    with pytest.raises(SimsError) as error:
        load_recipe("digits", overrides)
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message
    assert message.count("; ") <= 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampler.solver=euler", "sampler.S_churn=40"],
        ["sampler.S_min=1", "sampler.S_max=1"],
        ["guidance.sigma_lo=5"],
        ["guidance.sigma_lo=0.2", "guidance.sigma_hi=0.3"],
        [EDM2, "network.channels_per_head=8", "train.ema_stds=[0.05,0.28]", "train.augment=0", "finetune.augment=0"],
    ],
    ids=" ".join,
)
def test_settings_at_the_edge_of_what_fits_are_taken(overrides: list[str]) -> None:
    recipe = load_recipe("digits", overrides)
    assert recipe != load_recipe("digits")


@pytest.mark.parametrize("name", builtin_recipes())
def test_overrides_do_not_leak_into_the_next_load_nor_into_other_recipes(name: str) -> None:
    before = {other: load_recipe(other) for other in builtin_recipes()}
    changed = load_recipe(
        name,
        ["tune.n_s=[7]", "tune.omega=[3]", "sampler.num_steps=3", "compute.num_workers=1", "train.lr=9", "name=mine"],
    )
    assert (changed.tune.n_s, changed.sampler.num_steps, changed.train.lr, changed.name) == ((7,), 3, 9, "mine")
    assert {other: load_recipe(other) for other in builtin_recipes()} == before


def test_what_a_caller_does_to_a_preset_stays_with_the_caller() -> None:
    name, before = "edm2-img512-s", load_recipe("edm2-img512-s")
    mine = presets()[name]
    mine.recipe["train"]["lr"] = 9
    mine.recipe["network"]["attn_resolutions"].append(4)
    mine.published["fid"] = 0
    assert load_recipe(name) == before
    assert presets()[name].published["fid"] == 2.56


@pytest.mark.parametrize("architecture", ["adm", "edm2"])
@pytest.mark.parametrize(
    ("widths", "refused_at"),
    [
        (dict(model_channels=32, channel_mult=(1,)), "the 32 channels at 8x8"),
        (dict(model_channels=224, channel_mult=(1,)), "the 224 channels at 8x8"),
        (dict(model_channels=32, channel_mult=(1, 2), attn_resolutions=(8, 4)), "the 32 channels at 8x8"),
        (dict(model_channels=32, channel_mult=(1, 2), attn_resolutions=(4,)), None),
        (dict(model_channels=64, channel_mult=(1, 2), attn_resolutions=(8, 4)), None),
    ],
)
def test_a_resolution_whose_attention_would_be_left_out_or_crash_is_refused_by_name(
    architecture: Literal["adm", "edm2"], widths: dict[str, Any], refused_at: str | None
) -> None:
    settings = NetworkSettings(architecture=architecture, **widths)
    if refused_at is None:
        assert network_entry(settings, (1, 8, 8), 0, False)["channels_per_head"] == 64
        return
    with pytest.raises(SimsError, match=refused_at):
        network_entry(settings, (1, 8, 8), 0, False)
