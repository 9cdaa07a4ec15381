"""What several verbs take: the number of workers, and a model from a run or from checkpoints."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sims_ray.errors import SimsError

WORKERS = re.compile(r"^(\d+)(?::(\d+))?$")

WorkersOption = Annotated[
    str | None,
    typer.Option(help="Workers: a number, or min:max for sampling actors that come and go with the cluster's nodes."),
]
GpusOption = Annotated[
    float | None, typer.Option(min=0, help="GPUs per worker, also a fraction; default 1 where this machine has one.")
]
RunOption = Annotated[Path | None, typer.Option(help="Output folder of a finished run.")]
ModelOption = Annotated[str | None, typer.Option(help="With --run: base, auxiliary or SIMS, as selected there.")]
BaseOption = Annotated[Path | None, typer.Option(help="Instead of --run: checkpoint of the base.")]
AuxOption = Annotated[Path | None, typer.Option(help="With --base: checkpoint of the auxiliary.")]
OmegaOption = Annotated[float | None, typer.Option(help="With --aux: guidance strength; 0 is the base.")]
PresetOption = Annotated[str | None, typer.Option(help="With --base: sample as this published model does.")]
SigmaLoOption = Annotated[float, typer.Option(help="With --base: guide at noise levels above this one only.")]
SigmaHiOption = Annotated[float | None, typer.Option(help="With --base: guide at noise levels up to this one only.")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Solver steps; default those of the run, or 18.")]


def workers_settings(workers: str | None) -> dict[str, Any]:
    """Settings `num_workers` and `max_workers` from `4` or `2:8`; none for None.

    Raises:
        SimsError: it is neither.
    """
    if workers is None:
        return {}
    match = WORKERS.match(workers)
    if match is None or (match[2] is not None and not 1 <= int(match[1]) <= int(match[2])):
        raise SimsError(f"--workers {workers} is not a number of workers; give one like 4, or a range like 2:8")
    return {"num_workers": int(match[1]), **({"max_workers": int(match[2])} if match[2] else {})}


def gpus_each(gpus: float | None) -> float:
    """GPUs per worker: as asked for, or one where this machine has any.

    Raises:
        SimsError: it is no number.
    """
    if gpus is None:
        import torch

        return float(torch.cuda.is_available())
    if not math.isfinite(gpus):
        raise SimsError(f"--gpus {gpus} is not a number of GPUs; give one like 1 or 0.5")
    return gpus


@dataclass(frozen=True)
class ModelChoice:
    """How a user names a model: by a finished run, or by checkpoints."""

    run: Path | None
    model: str | None
    base: Path | None
    aux: Path | None
    omega: float | None
    sigma_lo: float
    sigma_hi: float | None
    preset: str | None

    def open(self, verb: str, default: str, **sampler: Any) -> tuple[Any, Any]:
        """The model, `default` if a run's is not named, and the sampler settings as `sampler` sets them.

        Raises:
            SimsError: options that do not go together, or a run without that model.
        """
        if (self.run is None) == (self.base is None):
            raise SimsError(f"{verb} needs either --run FOLDER or --base CHECKPOINT; give one of them")
        guided = self.aux is not None or self.omega is not None or self.sigma_lo or self.sigma_hi is not None
        if self.run is not None and (guided or self.preset is not None):
            raise SimsError("--aux, --omega, --sigma-* and --preset go with --base; with --run choose by --model")
        if self.base is not None and self.model is not None:
            raise SimsError("--model goes with --run; a checkpoint given by --base is the model")
        if (self.aux is None) != (self.omega is None):
            raise SimsError("--aux and --omega go together; give the auxiliary and the guidance strength, or neither")
        if self.aux is None and (self.sigma_lo or self.sigma_hi is not None):
            raise SimsError("--sigma-lo and --sigma-hi limit guidance; give --aux and --omega too")
        if not all(map(math.isfinite, (self.omega or 0.0, self.sigma_lo))) or self.sigma_hi != self.sigma_hi:
            raise SimsError("--omega, --sigma-lo and --sigma-hi must be numbers; correct them")
        from sims_ray.config import SamplerSettings
        from sims_ray.storage.models import SimsModel
        from sims_ray.studies.sample import model_of_run, sampler_of_preset

        if self.base is not None:
            source = SimsModel.of(self.base, self.aux, self.omega or 0.0, self.sigma_lo, self.sigma_hi)
            settings = sampler_of_preset(self.preset) if self.preset else SamplerSettings()
        else:
            source, settings = model_of_run(self.run or Path(), self.model or default)
        return source, settings.model_copy(update={key: value for key, value in sampler.items() if value is not None})
