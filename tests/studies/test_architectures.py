"""Every architecture and training policy goes through a whole run."""

import math
from pathlib import Path

import pytest
import torch

from sims_ray.storage.checkpoints import load_tensors
from sims_ray.storage.posthoc import PATTERN, reconstruct
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe

NUM_STEPS = 4
EDM2 = (
    "network.architecture=edm2", "network.model_channels=16", "network.channels_per_head=8", "network.conditional=true",
    "train.ema_stds=[0.05,0.1]", "train.ema_snapshot_kimg=0.5", "train.gradient_limit=0", "train.lr_decay_kimg=1",
    "finetune.ema_stds=[0.05,0.1]", "finetune.ema_snapshot_kimg=0.25",
)  # fmt: skip
ADM = ("network.architecture=adm", "network.model_channels=16", "network.channels_per_head=8")
NCSNPP = ("network.architecture=ncsnpp", "train.augment=0.1")


BASE = 2 * NUM_STEPS - 1  # Heun's second evaluation is left out in the last step


def costs(sims: float) -> dict[str, float]:
    """Evaluations per image: the base with more steps has the least odd number that SIMS does not exceed."""
    matched = 2 * math.ceil((sims + 1) / 2) - 1
    base = {"base": BASE, "base, matched evaluations": matched, "base, matched training": BASE}
    return {**base, "auxiliary": BASE, "SIMS": sims}


def nfe_by_model(summary: dict[str, object]) -> dict[str, float]:
    return {row["model"]: row["evaluations_per_image"] for row in summary["table"]}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(EDM2, id="edm2"),
        pytest.param(ADM, id="adm", marks=pytest.mark.slow),
        pytest.param(NCSNPP, id="ncsnpp", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_any_architecture_ends_with_a_table_whose_costs_are_those_of_theory(
    settings: tuple[str, ...], out: Path, tiny: TinyRecipe
) -> None:
    summary = SimsRun(tiny(*settings), out).report()
    assert nfe_by_model(summary) == costs(2 * BASE)


@pytest.mark.parametrize(
    "settings", [EDM2, ("finetune.trainable_resolution=8",)], ids=["edm2", "ddpmpp, upper decoder"]
)
def test_an_auxiliary_trained_in_its_decoder_alone_costs_half_as_much_again_as_the_base(
    settings: tuple[str, ...], out: Path, tiny: TinyRecipe
) -> None:
    summary = SimsRun(tiny(*settings, "finetune.trainable=decoder"), out).report()
    assert nfe_by_model(summary) == costs(1.5 * BASE)
    blocks = [row["blocks"] for row in summary["table"]]
    assert blocks[0] != blocks[1] != blocks[2]  # the decoder did train


def test_a_guidance_interval_costs_one_more_evaluation_per_one_inside(out: Path, tiny: TinyRecipe) -> None:
    # 4 steps start at 80, 9.7, 0.47, 0.002: one of them, with two evaluations, lies inside.
    summary = SimsRun(tiny("guidance.sigma_lo=1", "guidance.sigma_hi=10"), out).report()
    assert nfe_by_model(summary) == costs(BASE + 2)


def test_a_power_function_snapshot_is_the_average_that_its_stored_ones_reconstruct(out: Path, tiny: TinyRecipe) -> None:
    run = SimsRun(tiny(*EDM2, "train.ema_std=0.12"), out)
    run.train_base()
    tensors, card = load_tensors(run.plan.base)
    assert card["ema"] == {"kind": "power", "std": 0.12}
    again, again_card = reconstruct(list(run.plan.base.parent.glob(PATTERN)), 0.12)
    assert again_card["nimg"] == card["nimg"]
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    other, _ = reconstruct(list(run.plan.base.parent.glob(PATTERN)), 0.05)
    assert any(not torch.equal(other[name], tensor) for name, tensor in tensors.items())
