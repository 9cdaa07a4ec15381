"""Sets measured against real images: the laws that the values keep, and what is refused before any work."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sims_ray.config import FeatureSettings
from sims_ray.data.importers import import_digits
from sims_ray.data.samples import Samples
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.metrics.features import feature_moments, image_features, pixel_features
from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.infinity import frechet_infinity
from sims_ray.metrics.kid import kid
from sims_ray.metrics.manifold import manifold_scores
from sims_ray.metrics.memorisation import ssim
from sims_ray.metrics.moments import Moments
from sims_ray.metrics.reference import read_statistics
from sims_ray.metrics.spread import small_n_bias
from sims_ray.metrics.wasserstein import sliced_squared_wasserstein, squared_wasserstein
from sims_ray.nn.classifier import FeatureClassifier
from sims_ray.stages import features as features_stage
from sims_ray.stages.features import load_extractor, load_reference
from sims_ray.storage.artifacts import Artifact
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.studies import measure, set_metrics
from sims_ray.studies.measure import Measured, measure_images
from sims_ray.studies.measure_request import Request
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe
from tests.data.tables import commit, random_rows

PIXELS = FeatureSettings(kind="pixels")
NOTHING: tuple[set_metrics.Extra, ...] = ()
Tables = dict[str, str]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """The digits in random order, with the parity of their labels as attribute."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    import_digits(Artifact(folder, "import", {"source": "digits"}, ()))
    rows = SampleTable(folder).head(1797)[np.random.default_rng(0).permutation(1797)]
    return Samples(np.arange(1797), rows.images, rows.labels, attributes=(rows.labels % 2).astype(np.int32))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, digits: Samples) -> Tables:
    """`real`: 1,197 digits in two files; `set`: the other 600; `copied`: 100 of the real ones and 300 others."""
    folder = tmp_path_factory.mktemp("tables")
    order = np.concatenate([np.arange(600, 700), np.arange(300)])
    parts = {"real": [digits[600:1000], digits[1000:]], "set": [digits[:600]], "copied": [digits[order]]}
    return {name: str(commit(folder / name, *rows).folder) for name, rows in parts.items()}


def pixels(samples: Samples) -> NDArray[np.float32]:
    return pixel_features(torch.from_numpy(samples.images.copy())).numpy()


def value(found: Measured, measure_: str, of: str = "all") -> float:
    (one,) = [v.value for v in found.values if v.metric.partition("@")[0] == measure_ and v.of == of]
    assert one is not None
    return one


# --- laws


def test_a_set_against_itself_is_at_distance_0_and_all_of_it_is_precise_recalled_and_copied(tables: Tables) -> None:
    found = measure_images(Request(tables["set"], tables["set"], PIXELS, copies=True))
    assert value(found, "fd_pixels") < 1e-6
    assert [value(found, f"{name}_pixels") for name in ("precision", "recall", "coverage", "copies")] == [1, 1, 1, 1]
    assert value(found, "copy_distance_pixels") == 0 and value(found, "ssim_nearest_pixels") == pytest.approx(1)


def test_every_value_is_that_of_the_metric_on_features_taken_directly(tables: Tables, digits: Samples) -> None:
    found = measure_images(Request(tables["set"], tables["real"], PIXELS))
    mine, real = pixels(digits[:600]), pixels(digits[600:])
    reference = Moments.of(real)
    assert value(found, "fd_pixels") == pytest.approx(frechet_distance(Moments.of(mine), reference), rel=1e-9)
    assert value(found, "kid_pixels") == pytest.approx(kid(real, mine), rel=1e-9)
    assert value(found, "fd_inf_pixels") == pytest.approx(frechet_infinity(mine, reference).intercept, rel=1e-6)
    first = real[np.random.default_rng(0).permutation(1197)[:600]]
    scores = manifold_scores(first, mine, 5)
    for name in ("precision", "recall", "density", "coverage"):
        assert value(found, f"{name}_pixels") == getattr(scores, name)
    names = [v.metric for v in found.values]
    assert names[:2] == ["fd_pixels@600", "kid_pixels@600"] and names[-1] == "fd_inf_pixels@600"
    assert [v.reference_nimg for v in found.values] == [1197, 1197, 600, 600, 600, 600, 1197]


def test_measures_of_pairs_take_as_many_of_a_larger_set_as_there_are_real_images(tables: Tables) -> None:
    found = measure_images(Request(tables["real"], tables["set"], PIXELS))
    shown = {v.metric: v.reference_nimg for v in found.values}
    assert shown["fd_pixels@1197"] == shown["kid_pixels@1197"] == shown["precision_pixels@600"] == 600
    assert value(found, "precision_pixels") > 0.8 and found.bias is None


def test_the_order_of_the_images_and_their_labels_change_nothing_overall(
    tables: Tables, digits: Samples, tmp_path: Path
) -> None:
    first = digits[:600]
    order = np.random.default_rng(1).permutation(600)
    labels = np.random.default_rng(2).permutation(first.labels)
    shuffled = Samples(first.ids, first.images[order], labels)
    again = commit(tmp_path / "set", shuffled)
    for name in ("kid", "manifold"):
        request = Request(tables["set"], tables["real"], PIXELS, measures=(name,))  # type: ignore[arg-type]
        one, other = (measure_images(request), measure_images(Request(str(again.folder), tables["real"], PIXELS)))
        for v in one.values:
            assert v.value == pytest.approx(value(other, v.metric.partition("@")[0]), rel=1e-8)


def test_a_set_sorted_by_class_that_is_larger_than_the_reference_is_compared_by_a_fair_choice(
    tables: Tables, digits: Samples, tmp_path: Path
) -> None:
    rows = 600 + np.argsort(digits[600:].labels, kind="stable")
    made = commit(tmp_path / "sorted", digits[rows])
    found = measure_images(Request(str(made.folder), tables["set"], PIXELS, measures=("manifold",)))
    one_after_the_other = manifold_scores(pixels(digits[:600]), pixels(digits[rows[:600]]), 5).recall
    assert one_after_the_other < 0.7 and value(found, "recall_pixels") > 0.8


@pytest.mark.parametrize("column", ["label", "attribute"])
def test_the_distance_of_a_group_is_that_of_its_own_table(
    column: set_metrics.Column, tables: Tables, digits: Samples, tmp_path: Path
) -> None:
    found = measure_images(Request(tables["set"], tables["real"], PIXELS, per=column, measures=NOTHING))
    groups = digits.labels if column == "label" else digits.attributes
    assert groups is not None
    assert [v.of for v in found.values] == ["all", *(f"{column} {g}" for g in np.unique(groups))]
    for group in np.unique(groups)[:2]:
        rows = np.flatnonzero(groups == group)
        mine, real = (
            str(commit(tmp_path / f"{group}{name}", digits[some]).folder)
            for name, some in (("mine", rows[rows < 600]), ("real", rows[rows >= 600]))
        )
        split = measure_images(Request(mine, real, PIXELS, measures=NOTHING)).values[0]
        (own,) = [v for v in found.values if v.of == f"{column} {group}"]
        assert own.value == pytest.approx(split.value, rel=1e-8)
        assert (own.metric, own.reference_nimg) == (split.metric, split.reference_nimg)
        assert own.metric == f"fd_pixels@{(rows < 600).sum()}"


def test_groups_with_as_few_images_as_features_say_that_they_are_rank_deficient(tables: Tables) -> None:
    found = measure_images(Request(tables["set"], tables["real"], PIXELS, per="label", measures=NOTHING))
    for v in found.values[1:]:
        assert ("rank-deficient" in v.note) == (int(v.metric.partition("@")[2]) <= 64)
    by_attribute = measure_images(Request(tables["set"], tables["real"], PIXELS, per="attribute", measures=NOTHING))
    assert [v.note for v in by_attribute.values] == ["", "", ""]


def test_groups_are_the_same_however_many_of_them_are_at_work(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(tables["set"], tables["real"], PIXELS, per="label", measures=NOTHING)
    expected = measure_images(request).values
    monkeypatch.setattr(set_metrics, "GROUP_BYTES", 3 * 16 * 64**2)
    assert measure_images(request).values == expected


def test_a_group_without_images_on_a_side_has_no_distance_and_says_why(
    tables: Tables, digits: Samples, tmp_path: Path
) -> None:
    first = digits[:600]
    labels = np.where(first.labels == 3, 11, np.where(first.labels == 4, -1, first.labels)).astype(np.int32)
    made = commit(tmp_path / "set", Samples(first.ids, first.images, labels))
    found = measure_images(Request(str(made.folder), tables["real"], PIXELS, per="label", measures=NOTHING))
    none = {v.of: v for v in found.values if v.value is None}
    assert set(none) == {"label 3", "label 4", "label 11", "label none"}
    assert all("fewer than 2 images" in v.note for v in none.values())
    assert none["label 3"].metric == "fd_pixels@0" and none["label 11"].reference_nimg == 0


def test_copies_are_found_by_the_rule_beside_what_the_training_set_has_itself(tables: Tables, digits: Samples) -> None:
    found = measure_images(Request(tables["copied"], tables["real"], PIXELS, copies=True, measures=NOTHING))
    others = measure_images(Request(tables["set"], tables["real"], PIXELS, copies=True, measures=NOTHING))
    assert value(others, "copies_pixels") == 0 and value(found, "copies_pixels") == 100 / 400
    assert value(found, "copies_training_pixels", "reference") == 0
    mine, real = pixels(digits[np.arange(300)]).astype(float), pixels(digits[600:]).astype(float)
    distances = np.sqrt(((mine[:, None] - real) ** 2).sum(-1))
    assert value(found, "copy_distance_pixels") == pytest.approx(distances.min(1).sum() / 400, rel=1e-6)
    among = np.sqrt(np.maximum(0, (real**2).sum(1)[:, None] + (real**2).sum(1) - 2 * real @ real.T))
    np.fill_diagonal(among, np.inf)
    assert value(found, "copy_distance_training_pixels", "reference") == pytest.approx(among.min(1).mean(), rel=1e-6)
    nearest = digits[600:].images[distances.argmin(1)]
    expected = (100 + ssim(digits[:300].images, nearest).sum()) / 400
    assert value(found, "ssim_nearest_pixels") == pytest.approx(expected, rel=1e-9)


def test_the_likeness_to_the_nearest_is_taken_of_as_many_images_as_memory_holds(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_metrics, "SSIM_BYTES", 50 * 64)
    found = measure_images(Request(tables["real"], tables["real"], PIXELS, copies=True, measures=NOTHING))
    assert found.values[-1].metric == "ssim_nearest_pixels@50" and found.values[-1].value == pytest.approx(1)


def test_the_bias_of_few_images_is_measured_on_the_reference_and_told(
    tables: Tables, digits: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    found = measure_images(Request(tables["set"], tables["real"], PIXELS, nimg=200, measures=NOTHING))
    order = np.random.default_rng(0).permutation(1197)
    expected = small_n_bias(pixels(digits[600:])[order], 200)
    assert found.bias is not None and found.bias.num_blocks == 5
    assert found.bias.mean == pytest.approx(expected.mean, rel=1e-9)
    (told,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    text = told.getMessage()
    assert f"{expected.mean:.4g} (standard error {expected.standard_error:.2g})" in text
    assert text.startswith("fd_pixels@200 is ") and "compare at equal numbers" in text


def test_a_bias_that_hardly_matters_is_told_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    real = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    with caplog.at_level(logging.INFO, "sims_ray"):
        bias = set_metrics.warn_of_few("fd_x@1k", 1e6, real, 1000)
        assert bias is not None and [r.levelno for r in caplog.records] == [logging.INFO]
        assert set_metrics.warn_of_few("fd_x@1k", 1e6, real[1:], 1000) is None and len(caplog.records) == 1


def test_a_set_of_n_images_is_that_table_s_random_choice(tables: Tables, digits: Samples) -> None:
    found = measure_images(Request(tables["set"], tables["real"], PIXELS, nimg=250, measures=NOTHING))
    rows = np.sort(np.random.default_rng(0).choice(600, 250, replace=False))
    moments = Moments.of(pixels(digits[rows]))
    expected = frechet_distance(moments, Moments.of(pixels(digits[600:])))
    assert value(found, "fd_pixels") == pytest.approx(expected, rel=1e-9)
    assert found.values[0].metric == "fd_pixels@250"


def test_of_a_large_reference_a_sample_is_kept_and_all_of_it_counts(
    tables: Tables, digits: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (measure, set_metrics):
        monkeypatch.setattr(module, "FEWEST_KEPT", 100)
    found = measure_images(Request(tables["set"], tables["real"], PIXELS, nimg=150, measures=("kid",)))
    whole = Moments.of(pixels(digits[600:]))
    rows = np.sort(np.random.default_rng(0).choice(600, 150, replace=False))
    assert value(found, "fd_pixels") == pytest.approx(frechet_distance(Moments.of(pixels(digits[rows])), whole))
    assert [v.reference_nimg for v in found.values] == [1197, 150]
    assert found.bias is not None and found.bias.num_blocks == 2  # of 300 that were kept


# --- statistics


def test_statistics_that_were_written_give_the_same_distance(tables: Tables, tmp_path: Path) -> None:
    file = tmp_path / "stats" / "real.npz"
    first = measure_images(Request(tables["set"], tables["real"], PIXELS, statistics=file))
    again = measure_images(Request(tables["set"], str(file), PIXELS))
    assert value(again, "fd_pixels") == pytest.approx(value(first, "fd_pixels"), rel=1e-9)
    assert [v.metric for v in again.values] == ["fd_pixels@600"] and again.values[0].reference_nimg == 1197
    assert again.bias is None


def test_statistics_are_written_without_a_set_too(tables: Tables, digits: Samples, tmp_path: Path) -> None:
    file = tmp_path / "real.npz"
    found = measure_images(Request(None, tables["real"], PIXELS, statistics=file))
    written, expected = read_statistics(file), feature_moments(pixel_features, digits[600:].images.copy())
    assert found.values == () and found.features == "pixels" and written.n == 1197
    np.testing.assert_allclose(written.mean, expected.mean, rtol=1e-9)
    np.testing.assert_allclose(written.covariance, expected.covariance, rtol=1e-9, atol=1e-12)
    assert set(np.load(file).files) == {"mu", "sigma", "n"}


# --- features


def test_a_classifier_is_trained_on_the_reference_as_a_run_does_it(tables: Tables, tmp_path: Path) -> None:
    settings = FeatureSettings(steps=20, width=4, feature_dim=8)
    found = measure_images(Request(tables["set"], tables["real"], settings, measures=("kid",)))
    made = Artifact(tmp_path / "features", "features", {}, ())
    features_stage.make_features(made, settings, tables["real"], measure.ComputeSettings(num_workers=0))
    mine = image_features(load_extractor(made.path).features, SampleTable(tables["set"]).head(600).images.copy())
    expected = frechet_distance(Moments.of(mine), load_reference(made.path))
    assert value(found, "fd_classifier") == pytest.approx(expected, rel=1e-6)
    per = measure_images(Request(tables["set"], tables["real"], settings, per="label", measures=NOTHING))
    assert value(per, "fd_classifier") == pytest.approx(expected, rel=1e-6) and len(per.values) == 11


def test_a_checkpoint_s_features_are_taken_from_its_file(tables: Tables, digits: Samples, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = FeatureClassifier(1, 10, 4, 8).eval().requires_grad_(False)
    architecture = {"width": 4, "feature_dim": 8, "img_channels": 1, "num_classes": 10}
    path = tmp_path / "c.safetensors"
    save_tensors(path, net.state_dict(), {"architecture": architecture, "resolution": [8, 8]})
    settings = FeatureSettings(kind="checkpoint", weights=str(path))
    found = measure_images(Request(tables["set"], tables["real"], settings, measures=("w2",)))
    mine, real = (image_features(net.features, part.images.copy()) for part in (digits[:600], digits[600:]))
    assert value(found, "fd_classifier") == pytest.approx(
        frechet_distance(Moments.of(mine), Moments.of(real)), rel=1e-6
    )
    assert [v.metric for v in found.values] == ["fd_classifier@600", "w2_classifier@600", "sliced_w2_classifier@600"]
    small = str(commit(tmp_path / "small", random_rows(9, (1, 4, 4))).folder)
    with pytest.raises(SimsError, match="are of images of 1 x 8 x 8 and these are of 1 x 4 x 4; choose other features"):
        measure_images(Request(small, tables["real"], settings))


@pytest.fixture(scope="module")
def run(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> SimsRun:
    """A run with features, and the result that a finished one leaves."""
    made = SimsRun(tiny(), tmp_path_factory.mktemp("run"))
    made.make_features()
    settings = made.recipe.model_dump(mode="json", exclude={"compute": True, "tracking": True, "data": {"reading"}})
    (made.out / "result.json").write_text(json.dumps({"settings": settings}))
    return made


def test_a_run_s_features_and_its_reference_are_taken_as_they_are(
    run: SimsRun, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = load_extractor(run.plan.features.path)
    mine = image_features(extractor.features, SampleTable(tables["set"]).head(600).images.copy())
    expected = frechet_distance(Moments.of(mine), load_reference(run.plan.features.path))
    passes: list[str] = []
    take = measure.table_features

    def counted(*words: Any, **options: Any) -> Any:
        passes.append(words[2])
        return take(*words, **options)

    monkeypatch.setattr(measure, "table_features", counted)
    found = measure_images(Request(tables["set"], run=run.out))
    assert value(found, "fd_classifier") == pytest.approx(expected, rel=1e-9) and passes == ["features of the set"]
    copies = measure_images(Request(tables["set"], run=run.out, copies=True, measures=NOTHING))
    assert value(copies, "fd_classifier") == pytest.approx(expected, rel=1e-6) and len(passes) == 3
    assert value(copies, "copies_classifier") == 1  # the run's real images are all digits
    other = measure_images(Request(tables["set"], tables["set"], run=run.out, measures=NOTHING))
    assert value(other, "fd_classifier") < 1e-6


def test_a_run_with_statistics_of_the_user_s_is_measured_against_those(
    tiny: TinyRecipe, tables: Tables, tmp_path: Path
) -> None:
    file = tmp_path / "given.npz"
    measure_images(Request(None, tables["set"], PIXELS, statistics=file))
    made = SimsRun(tiny("features.kind=pixels", f"features.statistics={file}"), tmp_path / "run")
    made.make_features()
    (made.out / "result.json").write_text(json.dumps({"settings": made.recipe.model_dump(mode="json")}))
    for copies in (False, True):
        found = measure_images(Request(tables["set"], run=made.out, copies=copies, measures=NOTHING))
        assert value(found, "fd_pixels") < 1e-6 and found.values[0].reference_nimg == 600


def test_a_folder_that_is_no_finished_run_is_named(run: SimsRun, tmp_path: Path) -> None:
    with pytest.raises(SimsError, match=r"result\.json is not the result of a run; finish"):
        measure_images(Request(None, run=tmp_path))
    (tmp_path / "result.json").write_text((run.out / "result.json").read_text())
    with pytest.raises(SimsError, match=r"is not there any more; run `sims run` again"):
        measure_images(Request(None, run=tmp_path))


# --- points


def points(out: Path, n: int, seed: int, shape: tuple[int, int, int] = (2, 1, 1)) -> str:
    return str(commit(out / str(seed), random_rows(n, shape, first_id=seed, kind="latent")).folder)


def test_points_are_their_own_features_and_have_w2(tmp_path: Path) -> None:
    a, b = points(tmp_path, 200, 1), points(tmp_path, 200, 2)
    found = measure_images(Request(a, b))
    mine, real = (SampleTable(t).head(200).images.reshape(200, 2).astype(np.float32) for t in (a, b))
    assert value(found, "fd_identity") == pytest.approx(frechet_distance(Moments.of(mine), Moments.of(real)), rel=1e-6)
    assert value(found, "w2_identity") == pytest.approx(squared_wasserstein(mine, real), rel=1e-9)
    assert value(found, "sliced_w2_identity") == pytest.approx(sliced_squared_wasserstein(mine, real), rel=1e-6)
    itself = measure_images(Request(a, a, measures=("w2",), copies=True))
    assert value(itself, "w2_identity") == 0 and value(itself, "sliced_w2_identity") == 0
    assert not any("ssim" in v.metric for v in itself.values)


def test_w2_pairs_as_many_points_as_both_sides_have_and_as_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = points(tmp_path, 90, 1), points(tmp_path, 60, 2)
    assert measure_images(Request(a, b, measures=("w2",))).values[1].metric == "w2_identity@60"
    monkeypatch.setattr(set_metrics, "MOST_POINTS", 50)
    assert measure_images(Request(a, b, measures=("w2",))).values[1].metric == "w2_identity@50"


# --- refusals


def test_measures_that_cannot_be_had_are_left_out_and_the_log_says_why(
    tables: Tables, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sims_ray"):
        found = measure_images(Request(tables["set"], tables["real"], PIXELS, nimg=5))
    assert {v.metric.partition("_")[0] for v in found.values} == {"fd", "kid"}
    assert "manifold is left out: it takes 6 images and there are 5" in caplog.text
    assert "fd_inf is left out: it takes 30 images and there are 5" in caplog.text


def refuse(reason: str, request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in one sentence, with nothing measured or trained."""

    def work(*words: Any, **options: Any) -> None:
        raise AssertionError("work was begun")

    for name in ("table_features", "make_features", "write_statistics"):
        monkeypatch.setattr(measure, name, work)
    with pytest.raises(SimsError) as error:
        measure_images(request)
    assert reason in str(error.value) and "; " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"nimg": 601}, "has 600 images; give --n from 2 to that"),
        ({"nimg": 0}, "give --n from 2"),
        ({"nimg": 1}, "give --n from 2"),
        (
            {"nimg": 5, "measures": ("manifold",)},
            "--measures manifold is not possible: it takes 6 images and there are 5",
        ),
        ({"nimg": 29, "measures": ("fd_inf",)}, "--measures fd_inf is not possible: it takes 30 images"),
        ({"measures": ("w2",)}, "at F = 64 features no n makes small"),
        ({"images": None}, "there is nothing to do"),
        ({"against": None}, "nothing to measure against"),
        ({"against": "nowhere"}, "nowhere has no manifest.json"),
        ({"against": "nowhere.npz"}, "nowhere.npz; give the statistics of real images with --against"),
        ({"against": "{file}", "copies": True}, "give the Fréchet distance alone; leave out --copies"),
        ({"against": "{file}", "per": "label"}, "leave out --per label"),
        ({"against": "{file}", "measures": ("kid", "w2")}, "leave out --measures kid,w2"),
        ({"against": "{file}", "statistics": Path("x.npz")}, "leave out --write-statistics"),
        ({"against": "{file}"}, "features differ in width"),
        ({"against": "{file}", "features": None}, "has no images to train a classifier on"),
        ({"against": "{small}"}, "features differ in width"),
        ({"against": "{small}", "features": None}, "a classifier takes one shape"),
        ({"against": "{unlabelled}", "features": None}, "9 images without a label"),
        ({"against": "{unlabelled}", "per": "label"}, "has no labels; leave --per out"),
        ({"against": "{unlabelled}", "per": "attribute"}, "has no column 'attribute'"),
        ({"images": "{unlabelled}", "per": "attribute"}, "has no column 'attribute'"),
        ({"against": "{latent}"}, "holds images and {latent} holds latents; decode the latents"),
        ({"against": "{latent}", "images": "{latent}"}, "only points of up to 8 numbers"),
        ({"against": "{latent}", "images": "{latent}", "features": None}, "holds latents of shape (4, 2, 2), and only"),
        (
            {"against": "{point}", "images": "{point}"},
            "only points of up to 8 numbers are measured as they are, without",
        ),
        ({"images": "{one}"}, "has too few images to measure, 1"),
        ({"images": "{none}"}, "has too few images to measure, 0"),
        ({"against": "{two}", "copies": True}, "--copies is not possible: it takes 3 images and there are 2"),
        ({"statistics": Path("{file}")}, "stats.npz exists; choose another name"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    options: dict[str, Any], reason: str, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    eight, none = (1, 8, 8), np.full(9, -1, np.int32)
    rows = {
        "small": random_rows(50, (1, 4, 4), labels=np.arange(50, dtype=np.int32) % 10),
        "unlabelled": random_rows(9, eight, labels=none),
        "latent": random_rows(9, (4, 2, 2), kind="latent"),
        "point": random_rows(9, (2, 1, 1), kind="latent"),
        "one": random_rows(1, eight),
        "two": random_rows(2, eight, labels=np.array([0, 1], np.int32)),
        "none": random_rows(0, eight),
    }
    places = {name: str(commit(tmp_path / name, part).folder) for name, part in rows.items()}
    places["file"] = str(tmp_path / "stats.npz")

    def filled(option: Any) -> Any:
        text = str(option).format(**places) if isinstance(option, (str, Path)) else option
        return type(option)(text) if isinstance(option, Path) else text

    usual = {"images": tables["set"], "against": tables["real"], "features": PIXELS}
    request = Request(**{**usual, **{name: filled(option) for name, option in options.items()}})
    refuse(reason.format(**places), request, monkeypatch)
