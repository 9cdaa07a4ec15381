"""`sims measure`: a set of images against real ones, by every metric."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from sims_ray.errors import SimsError

if TYPE_CHECKING:
    from sims_ray.config import FeatureSettings
    from sims_ray.studies.set_metrics import Extra, Value

HEADER = ("metric", "of", "value", "real images", "note")
OPTIONS = (  # settings of a recipe as this verb calls them
    ("--set features.kind=", "--features "),
    ("--set features.weights=", "--weights "),
    ("features.kind=", "--features "),
    ("features.weights", "--weights"),
    ("set kind=", "give --features "),
)

app = typer.Typer()


@app.command(epilog="Example: sims measure runs/synthetic --against data/photos --features inception --copies")
def measure(
    images: Annotated[
        str | None, typer.Argument(metavar="SET", help="Folder of a sample table, or s3://... or gs://...")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Sample table of real images, or statistics of EDM or clean-fid (.npz).")
    ] = None,
    features: Annotated[
        Literal["classifier", "inception", "dinov2", "checkpoint", "pixels"] | None,
        typer.Option(help="What distances are measured in; by default a classifier is trained on the real labels."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="With --features checkpoint, inception or dinov2: file of the weights.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Instead of --features: the features of this finished run, and its real images.")
    ] = None,
    n: Annotated[
        int | None, typer.Option(help="Images of SET: a synthetic set's first ones, else a random choice.")
    ] = None,
    per: Annotated[
        Literal["label", "attribute"] | None, typer.Option(help="Also the Fréchet distance of each class or attribute.")
    ] = None,
    copies: Annotated[
        bool, typer.Option("--copies", help="Also near copies of real images, in these features.")
    ] = False,
    lpips: Annotated[
        bool, typer.Option("--lpips", help="With --copies: also LPIPS to the nearest real image (extra `lpips`).")
    ] = False,
    measures: Annotated[
        str | None, typer.Option(help="Beside fd: some of kid,manifold,fd_inf,w2; default all that can be had.")
    ] = None,
    write_statistics: Annotated[
        Path | None, typer.Option(help="Write mean and covariance of the real images here, as EDM and clean-fid do.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the values and the settings here as well.")] = None,
) -> None:
    """Measure any set of images against real ones: FD, KID, precision and recall, near copies; or write statistics."""
    _check(images, features, weights, run, n, per, copies, lpips, measures, json)
    from sims_ray.storage.artifacts import write_json
    from sims_ray.storage.folders import Folder
    from sims_ray.studies.measure import measure_images
    from sims_ray.studies.measure_request import Request

    settings, extras = _features(features, weights), _measures(measures)
    if json is not None:
        Folder.at(json.parent).check_writable()
    try:
        measured = measure_images(
            Request(images, against, settings, run, n, per, copies, lpips, extras, statistics=write_statistics)
        )
    except SimsError as error:
        raise SimsError(_in_options(str(error))) from error
    if measured.values:
        typer.echo(_table(measured.values))
    if write_statistics is not None:
        typer.echo(f"{write_statistics}: statistics of the real images in {measured.features} features")
    if json is not None:
        write_json(json, measured.plain)


def _check(
    images: str | None,
    features: str | None,
    weights: str | None,
    run: Path | None,
    n: int | None,
    per: str | None,
    copies: bool,
    lpips: bool,
    measures: str | None,
    json: Path | None,
) -> None:
    """Refuse options that do not go together."""
    if run is not None and (features is not None or weights is not None):
        raise SimsError("--features and --weights go without --run, which has features of its own; leave them out")
    of_set = {
        "--n": n,
        "--per": per,
        "--copies": copies or None,
        "--lpips": lpips or None,
        "--measures": measures,
        "--json": json,
    }
    given = [option for option, value in of_set.items() if value is not None]
    if images is None and given:
        raise SimsError(f"{' and '.join(given)}: of which set of images is not said; give SET")


def _features(kind: str | None, weights: str | None) -> FeatureSettings | None:
    """The settings of features; None where neither is given."""
    from pydantic import ValidationError

    from sims_ray.config import FeatureSettings

    if kind is None and weights is None:
        return None
    if kind is None:
        raise SimsError("--weights are of a kind of features; give --features checkpoint, inception or dinov2 too")
    try:
        return FeatureSettings.model_validate({"kind": kind, "weights": weights})
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SimsError(_in_options(f"features.{message}")) from None


def _measures(text: str | None) -> tuple[Extra, ...] | None:
    """Measures from words like `kid,manifold`; `fd` is there in any case."""
    from sims_ray.studies.set_metrics import Extra

    if text is None:
        return None
    words, known = {word.strip() for word in text.split(",")}, get_args(Extra)
    if unknown := sorted(words - {"fd", *known}):
        raise SimsError(f"--measures {text}: {unknown[0]!r} is not known; choose among fd, {', '.join(known)}")
    return tuple(name for name in known if name in words)


def _in_options(message: str) -> str:
    """What a stage says of settings, as options of this verb; paths stay as they are."""
    for setting, option in OPTIONS:
        message = re.sub(rf"(?<![\w/.]){re.escape(setting)}", option, message)
    return message


def _table(values: Sequence[Value]) -> str:
    """One line for each value."""
    from sims_ray.report.numbers import count, number
    from sims_ray.studies.console import align

    rows = [(v.metric, v.of, number(v.value), count(v.reference_nimg), v.note) for v in values]
    return align([HEADER, *rows])
