"""Reference statistics that the user gives, instead of those of the real images."""

from pathlib import Path

import numpy as np
import pytest

from sims_ray.config import load_recipe
from sims_ray.errors import SimsError
from sims_ray.metrics.frechet import Statistics, frechet_distance
from sims_ray.metrics.moments import Moments
from sims_ray.metrics.reference import write_statistics
from sims_ray.stages.cells import Cell
from sims_ray.stages.features import load_reference
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe

PIXELS = ("features.kind=pixels", "evaluate.measures=[]")


def statistics(path: Path, width: int = 64) -> Statistics:
    """A file of statistics that are those of no images here."""
    found = Statistics(np.linspace(-1, 1, width), np.diag(np.linspace(0.1, 0.5, width)), 50_000)
    write_statistics(path, found)
    return found


def test_the_distance_is_that_to_the_statistics_given(tmp_path: Path, out: Path, tiny: TinyRecipe) -> None:
    given = statistics(tmp_path / "given.npz")
    run = SimsRun(tiny(*PIXELS, f"features.statistics={tmp_path / 'given.npz'}"), out)
    measured = run.measure(Cell())
    for evaluation, block in zip(measured, run.plan.report_blocks, strict=True):
        moments = Moments.load(run.plan.evaluation(block, Cell()).artifact.path / "moments.npz")
        assert evaluation["distance"] == pytest.approx(frechet_distance(moments, given), rel=1e-12)
    reference = load_reference(run.plan.features.path)
    assert reference.n == 50_000 and np.array_equal(reference.mean, given.mean)


def test_other_statistics_are_another_artifact_and_the_same_elsewhere_are_not(tmp_path: Path, tiny: TinyRecipe) -> None:
    statistics(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    statistics(tmp_path / "c.npz", 65)

    def name(*overrides: str) -> str:
        return SimsRun(tiny(*PIXELS, *overrides), tmp_path / "run").plan.features.fingerprint

    own, a, b, c = name(), *(name(f"features.statistics={tmp_path / f'{x}.npz'}") for x in "abc")
    assert a == b and len({own, a, c}) == 3


@pytest.mark.parametrize("kind", ["missing", "wide", "broken", "classifier"])
def test_statistics_that_do_not_fit_are_one_sentence_and_leave_nothing(
    kind: str, tmp_path: Path, out: Path, tiny: TinyRecipe
) -> None:
    path = tmp_path / "given.npz"
    if kind != "missing":
        statistics(path, 65 if kind == "wide" else 64)
    if kind == "broken":
        path.write_bytes(path.read_bytes()[:100])
    says = {"missing": "no file", "wide": "width 65", "broken": "given.npz", "classifier": "kind=classifier"}[kind]
    features = () if kind == "classifier" else PIXELS
    with pytest.raises(SimsError, match=says) as caught:
        SimsRun(tiny(*features, f"features.statistics={path}"), out).make_features()
    assert "\n" not in str(caught.value)
    assert not list(out.glob("artifacts/features-*"))


def test_the_setting_is_part_of_a_recipe(tmp_path: Path) -> None:
    assert load_recipe("digits", [*PIXELS, "features.statistics=x.npz"]).features.statistics == "x.npz"
