"""`sims data synthesize`: a synthetic set of any model, outside of a recipe's run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from sims_ray.cli.options import (
    AuxOption,
    BaseOption,
    GpusOption,
    ModelChoice,
    ModelOption,
    OmegaOption,
    PresetOption,
    RunOption,
    SigmaHiOption,
    SigmaLoOption,
    StepsOption,
    WorkersOption,
    gpus_each,
    workers_settings,
)
from sims_ray.errors import SimsError

app = typer.Typer()

OutArgument = Annotated[
    str, typer.Argument(help="Folder or URI of the set; one that is there is gone on with, or extended.")
]
LabelsOption = Annotated[
    str | None,
    typer.Option(help="Classes: uniform, or YAML like '{probabilities: [.2, .8]}', '{quotas: {0: 700, 1: 300}}'."),
]
ClassifierOption = Annotated[Path | None, typer.Option(help="Fill a column `attribute` with what this one sees.")]
GroupsOption = Annotated[
    str | None, typer.Option(help="With --classifier: classes of each attribute, like '{0: [0, 1], 1: [8, 9]}'.")
]
SharesOption = Annotated[
    str | None,
    typer.Option(help="With --classifier: sample on until these shares are filled, like '{0: .7, 1: .3}'."),
]
ShardOption = Annotated[int | None, typer.Option(min=1, help="Images per file; default what a worker makes in 150 s.")]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Images sampled at once; default what a GPU's memory holds.")
]
MicroBatchOption = Annotated[
    int | None, typer.Option(min=1, help="Images per network call; then --batch does not change a bit.")
]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype of the network.")
]


@app.command("synthesize", epilog="Example: sims data synthesize s3://bucket/set --base base.safetensors --n 1500000")
def synthesize_(
    out: OutArgument,
    n: Annotated[int, typer.Option(min=1, help="Number of images.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the others follow.")] = 0,
    run: RunOption = None,
    model: ModelOption = None,
    base: BaseOption = None,
    aux: AuxOption = None,
    omega: OmegaOption = None,
    steps: StepsOption = None,
    preset: PresetOption = None,
    sigma_lo: SigmaLoOption = 0.0,
    sigma_hi: SigmaHiOption = None,
    labels: LabelsOption = None,
    classifier: ClassifierOption = None,
    groups: GroupsOption = None,
    shares: SharesOption = None,
    workers: WorkersOption = "2",
    gpus: GpusOption = None,
    shard_nimg: ShardOption = None,
    batch: BatchOption = None,
    micro_batch: MicroBatchOption = None,
    precision: PrecisionOption = "auto",
) -> None:
    """Sample a synthetic set, exactly once whatever dies; run again to go on, with a larger --n to extend it."""
    choice = ModelChoice(run, model, base, aux, omega, sigma_lo, sigma_hi, preset)
    source, sampler = choice.open("sims data synthesize", "base", num_steps=steps)
    if classifier is None and (groups is not None or shares is not None):
        raise SimsError("--groups and --shares are of a classifier's attributes; give --classifier too")
    from pydantic import StrictInt

    from sims_ray.config import ComputeSettings
    from sims_ray.data.table import SampleTable
    from sims_ray.stages.quota import QuotaJob, synthesize_quota
    from sims_ray.stages.synthesize import synthesize
    from sims_ray.storage.attributes import AttributeSource
    from sims_ray.studies.synthetic import synthesis_job

    compute = ComputeSettings(
        **workers_settings(workers),
        gpus_per_worker=gpus_each(gpus),
        sampling_batch=batch,
        micro_batch=micro_batch,
        precision=precision,
    )
    classes = None if groups is None else _mapping(groups, "--groups", dict[StrictInt, list[StrictInt]])
    wanted = None if shares is None else _mapping(shares, "--shares", dict[StrictInt, float])
    attributes = AttributeSource.of(classifier, classes) if classifier else None
    job = synthesis_job(
        out,
        source,
        sampler,
        range(seed, seed + n),
        labels=_labels(labels),
        attributes=attributes if wanted is None else None,
        shard_nimg=shard_nimg,
        precision=precision,
    )
    made = job.set.folder
    if attributes is not None and wanted is not None:
        quota = QuotaJob.under(out, job, attributes, wanted, n)
        synthesize_quota(quota, compute)
        made = quota.folder
    else:
        synthesize([job], compute)
    typer.echo(f"{made}: {len(SampleTable(made)):,} images of shape {job.set.shape}")


def _labels(text: str | None) -> Any:
    from pydantic import ValidationError

    from sims_ray.config.labels import LabelSettings

    if text is None:
        return None
    found = _mapping(text, "--labels", dict[str, Any]) if text.lstrip().startswith("{") else {"kind": text}
    kind = next((name for name in ("probabilities", "quotas") if name in found), found.get("kind"))
    try:
        return LabelSettings(**{"kind": kind, **found})
    except ValidationError as error:
        raise SimsError(f"--labels {text}: {_first(error)}; correct it") from None


def _mapping(text: str, option: str, kind: Any) -> Any:
    """A mapping of that kind, written as YAML."""
    from pydantic import TypeAdapter, ValidationError

    try:
        found = TypeAdapter(kind).validate_python(yaml.safe_load(text))
    except yaml.YAMLError:
        found = None
    except ValidationError as error:
        raise SimsError(f"{option} {text}: {_first(error)}; write it like '{{0: ..., 1: ...}}'") from None
    if not found:
        raise SimsError(f"{option} {text} is not a mapping; write it like '{{0: ..., 1: ...}}'")
    return found


def _first(error: Any) -> str:
    """The first of the faults that pydantic found, as words."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    return (
        f"{where}: {fault['msg'].removeprefix('Value error, ')}"
        if where
        else fault["msg"].removeprefix("Value error, ")
    )
