"""What is trained: the job of one training run, and where its snapshots lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sims_ray.config import FinetuneSettings, OptimizerSettings
from sims_ray.diffusion.training import Optimization
from sims_ray.stages.training_set import TrainingSet
from sims_ray.storage.artifacts import Artifact

KIMG = 1000
ADAM_BETA1 = 0.9
AUTO = "auto"


@dataclass(frozen=True)
class TrainJob:
    """What to train, on what, and where it lands.

    Attributes:
        role: "base" or "auxiliary".
        artifact: the training artifact.
        network: entry `network` of the checkpoint card.
        settings: optimiser, EMA and noise.
        budgets_kimg: a snapshot of the EMA weights is left at each; the last one ends the run.
        table: sample table to train on, its folder or URI.
        num_rows: rows of it to use, from the first; None for all.
        init: checkpoint whose weights to start from; None for fresh weights.
        precision: dtype of the network on a GPU.
        reading: 'resident', 'streaming', or 'auto'; does not change the result.
    """

    role: str
    artifact: Artifact
    network: Mapping[str, Any]
    settings: OptimizerSettings
    budgets_kimg: tuple[float, ...]
    table: str | Path
    num_rows: int | None = None
    init: Path | None = None
    precision: str = "float32"
    reading: str = AUTO

    @property
    def stop_nimg(self) -> int:
        """Images seen when training ends: the last budget, in whole batches."""
        batch_size = self.settings.batch_size
        return math.ceil(self.budgets_kimg[-1] * KIMG / batch_size) * batch_size

    def training_set(self) -> TrainingSet:
        """The rows to train on, checked.

        Raises:
            SimsError: the table has fewer, or labels that the network does not know.
        """
        return TrainingSet.of(self.table, self.num_rows, self.settings.seed, self.network["label_dim"])

    def optimization(self) -> Optimization:
        """The step's settings, counts in images."""
        s = self.settings
        return Optimization(
            batch_size=s.batch_size,
            lr=s.lr,
            lr_rampup_nimg=s.lr_rampup_kimg * KIMG,
            ema_halflife_nimg=s.ema_halflife_kimg * KIMG,
            ema_rampup_ratio=s.ema_rampup_ratio,
            P_mean=s.P_mean,
            P_std=s.P_std,
            seed=s.seed,
            lr_decay_nimg=s.lr_decay_kimg * KIMG,
            adam_betas=(ADAM_BETA1, s.adam_beta2),
            ema_stds=s.ema_stds,
            gradient_limit=s.gradient_limit,
            loss_scale=s.loss_scale,
            augment=s.augment,
            trainable=self.trainable,
            trainable_resolution=s.trainable_resolution if isinstance(s, FinetuneSettings) else 0,
        )

    @property
    def trainable(self) -> str:
        """Which parameters train: 'all' or 'decoder'."""
        return self.settings.trainable if isinstance(self.settings, FinetuneSettings) else "all"


def snapshot_name(budget_kimg: float) -> str:
    """File name of the EMA snapshot at a budget."""
    return f"ema-{budget_kimg:g}kimg.safetensors"
