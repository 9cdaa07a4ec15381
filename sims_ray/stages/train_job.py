"""What is trained: the job of one training run, what it starts from, and where its snapshots lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sims_ray.config import FinetuneSettings, OptimizerSettings
from sims_ray.diffusion.noise import step_generator
from sims_ray.diffusion.optimization import Optimization
from sims_ray.errors import SimsError
from sims_ray.nn.networks import build_network
from sims_ray.nn.precond import Precond
from sims_ray.stages.preview import Preview
from sims_ray.stages.training_log import read_metrics
from sims_ray.stages.training_set import TrainingSet
from sims_ray.storage.artifacts import Artifact, fingerprint
from sims_ray.storage.checkpoints import load_model, load_tensors
from sims_ray.storage.posthoc import average_path
from sims_ray.storage.training_states import state_path

SNAPSHOTS = "snapshots"  # entry of the manifest's result: file by budget
KIMG = 1000
BUDGET_DIGITS = 12  # of kimg: budgets that differ by an image have names that do
ADAM_BETA1 = 0.9
AUTO = "auto"


@dataclass(frozen=True)
class TrainJob:
    """What to train, on what, and where it lands.

    The artifact is named by what makes the weights, not by how long they are trained: it can be extended, and its
    snapshots are the shorter runs.

    Attributes:
        role: "base", "auxiliary", or "longer base": a base of the user's, trained on with real images.
        artifact: the training artifact.
        network: entry `network` of the checkpoint card.
        settings: optimiser, EMA and noise.
        budgets_kimg: a snapshot of the EMA weights is left at each; the last one ends the run.
        table: sample table to train on, its folder or URI.
        num_rows: rows of it to use, from the first; None for all.
        init: checkpoint whose weights to start from; None for fresh weights.
        precision: dtype of the network on a GPU.
        reading: 'resident', 'streaming', or 'auto'; does not change the result.
        init_state: resumable state at the end of the run that `init` is of; None where there is none.
        preview: what to show while it trains; None for nothing.
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
    init_state: Path | None = None
    preview: Preview | None = None

    @property
    def stop_nimg(self) -> int:
        """Images seen when training ends: at the last snapshot."""
        return self.snapshot_nimg(self.budgets_kimg[-1])

    @property
    def first_nimg(self) -> int:
        """Images seen at the first snapshot."""
        return self.snapshot_nimg(self.budgets_kimg[0])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what makes the weights, whatever the budgets."""
        return self.artifact.fingerprint

    @property
    def complete(self) -> bool:
        """Whether every budget has its snapshot.

        Raises:
            SimsError: a committed file is missing or has another size.
        """
        return not self.missing_kimg

    @property
    def missing_kimg(self) -> tuple[float, ...]:
        """The budgets whose snapshots the manifest does not list.

        Raises:
            SimsError: a committed file is missing or has another size.
        """
        listed = self.artifact.result[SNAPSHOTS] if self.artifact.complete else {}
        return tuple(budget for budget in self.budgets_kimg if budget_name(budget) not in listed)

    def snapshot_nimg(self, budget_kimg: float) -> int:
        """Images seen at the snapshot of a budget: the budget in whole batches, rounded up."""
        batch_size = self.settings.batch_size
        budget_nimg = round(budget_kimg * KIMG, 3)  # without what a float of kimg is off
        return math.ceil(budget_nimg / batch_size) * batch_size

    def snapshot(self, budget_kimg: float) -> Path:
        """The EMA snapshot at a budget."""
        return self.artifact.path / snapshot_name(budget_kimg)

    @property
    def end_state(self) -> Path:
        """The resumable state at the last budget, which a base keeps."""
        return state_path(self.artifact.path, self.stop_nimg)

    def snapshot_fingerprint(self, budget_kimg: float) -> str:
        """What names the weights at a budget, for what is made from them: SHA-256 over training and images seen."""
        return fingerprint("snapshot", {"nimg": self.snapshot_nimg(budget_kimg)}, [self.artifact.fingerprint])

    def average_paths(self, nimg: int) -> list[Path]:
        """The power-function averages that the snapshot at `nimg` images seen is reconstructed from.

        They are those on the grid of `ema_snapshot_kimg` and the last one; those of other budgets are left out, or the
        snapshot would depend on which budgets were made before.
        """
        s, period = self.settings, self.settings.ema_snapshot_kimg * KIMG
        grid = [n for n in range(s.batch_size, nimg, s.batch_size) if n // period > (n - s.batch_size) // period]
        return [average_path(self.artifact.path, n, std) for n in (*grid, nimg) for std in s.ema_stds]

    def log_rows(self) -> list[dict[str, float]]:
        """The training log up to the last budget, whatever longer training came after."""
        return [row for row in read_metrics(self.artifact.path) if row["nimg"] <= self.stop_nimg]

    def training_set(self) -> TrainingSet:
        """The rows to train on, checked.

        Raises:
            SimsError: the table has fewer, images of another shape, or labels that the network does not know.
        """
        found = TrainingSet.of(self.table, self.num_rows, self.settings.seed, self.network["label_dim"])
        resolution = self.network["img_resolution"]
        wanted = (self.network["img_channels"], resolution, resolution)
        if found.table.shape != wanted:
            raise SimsError(
                f"{found.table.folder} holds images of {found.table.shape}, but the network of this {self.role} takes "
                f"{wanted}; give it a table of that shape"
            )
        return found

    def network_at_start(self) -> Precond:
        """The network that training starts from: fresh, with the EMA weights of `init`, or its training weights.

        Dropout is that of fine-tuning, where it is set; what is sampled does not know dropout.

        Raises:
            SimsError: `init` or `init_state` is no checkpoint, or there is no such state.
        """
        torch.manual_seed(step_generator(self.settings.seed, 0, "weights").initial_seed())
        if self.init is None:
            return build_network(self.network)
        net, card = load_model(self.init)
        if isinstance(self.settings, FinetuneSettings):
            if self.settings.dropout is not None:
                tensors = net.state_dict()
                net = build_network({**card["network"], "dropout": self.settings.dropout})
                net.load_state_dict(tensors)
            if self.settings.start == "weights":
                net.load_state_dict({k.removeprefix("net."): v for k, v in self._of_init_state("net.").items()})
        return net.requires_grad_(True)

    def moments_at_start(self) -> dict[str, Tensor]:
        """Adam's moments at the end of the base, named `adam.<parameter>.<moment>`; none where Adam starts anew.

        Raises:
            SimsError: `init_state` is no checkpoint, or there is no such state.
        """
        s = self.settings
        return {} if not isinstance(s, FinetuneSettings) or s.reset_optimizer else self._of_init_state("adam.")

    def _of_init_state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of the state at the end of the base whose names start so."""
        if self.init_state is None or not self.init_state.is_file():
            raise SimsError(
                f"finetune.start=weights and finetune.reset_optimizer=false need the base's last training state, and "
                f"{self.init_state or 'a base that was not trained here'} is not there; set them back, or train the "
                f"base here and anew"
            )
        tensors, _ = load_tensors(self.init_state)
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

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
            gradient_clip=s.gradient_clip,
            loss_scale=s.loss_scale,
            augment=s.augment,
            trainable=self.trainable,
            trainable_resolution=s.trainable_resolution if isinstance(s, FinetuneSettings) else 0,
        )

    @property
    def trainable(self) -> str:
        """Which parameters train: 'all' or 'decoder'."""
        return self.settings.trainable if isinstance(self.settings, FinetuneSettings) else "all"


def budget_name(budget_kimg: float) -> str:
    """A budget in kimg as files and manifests name it."""
    return f"{budget_kimg:.{BUDGET_DIGITS}g}"


def snapshot_name(budget_kimg: float) -> str:
    """File name of the EMA snapshot at a budget."""
    return f"ema-{budget_name(budget_kimg)}kimg.safetensors"
