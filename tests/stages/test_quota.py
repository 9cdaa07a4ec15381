"""Quotas by attribute: the rows that the seeds, the classifier and the shares say, whatever happened on the way."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sims_ray.config import ComputeSettings, SamplerSettings
from sims_ray.data.quotas import gather, select, slots
from sims_ray.data.samples import Samples, read_metadata, write_samples
from sims_ray.data.synthetic import SyntheticSet
from sims_ray.data.table import SampleTable
from sims_ray.diffusion.generate import generate
from sims_ray.errors import SimsError
from sims_ray.nn.classifier import FeatureClassifier
from sims_ray.stages import quota
from sims_ray.stages.quota import QuotaJob, synthesize_quota
from sims_ray.stages.synthesize import SynthesisJob, synthesize
from sims_ray.storage.attributes import AttributeClassifier, AttributeSource
from sims_ray.storage.checkpoints import save_model, save_tensors
from sims_ray.storage.folders import Folder
from sims_ray.storage.models import SimsModel
from tests.networks import SETTINGS, small_network

ALONE = ComputeSettings(num_workers=0, micro_batch=50)
SAMPLER = SamplerSettings(num_steps=2).model_dump(mode="json")
ARCHITECTURE = {"width": 2, "feature_dim": 4, "img_channels": 1, "num_classes": 4}
SHARES = {0: 0.7, 1: 0.3}
GROUPS = {0: (2, 3), 1: (0,)}  # what is of class 1 has no attribute
FIRST_SEED = 7
PART = 64


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """What the base makes of the first seeds."""
    seeds = range(FIRST_SEED, FIRST_SEED + 400)
    batches = generate(small_network(), (1, 8, 8), seeds, SAMPLER, batch_size=50, micro_batch=50)
    return torch.cat([batch.images for batch in batches])


@pytest.fixture(scope="module")
def source(images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> AttributeSource:
    """A classifier that sees four classes in the images, of which the first is rare."""
    torch.manual_seed(0)
    net = FeatureClassifier(1, 4, width=2, feature_dim=4).eval()
    with torch.no_grad():
        logits = net(images)
        net.head.bias.copy_((net.head.bias - logits.mean(dim=0)) / logits.std(dim=0))
        net.head.weight.div_(logits.std(dim=0)[:, None])
        net.head.bias[0] -= 0.2
    path = tmp_path_factory.mktemp("features") / "classifier.safetensors"
    save_tensors(path, net.state_dict(), {"role": "feature classifier", "architecture": ARCHITECTURE})
    return AttributeSource.of(path, GROUPS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_model(path, small_network(), {"role": "base", "network": SETTINGS})
    return path


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "PART_SLOTS", PART)


@pytest.fixture
def synthesis(base: Path, tmp_path: Path) -> SynthesisJob:
    target = SyntheticSet(Folder.at(tmp_path / "set"), {"sampler": SAMPLER, "first_seed": FIRST_SEED}, (), (1, 8, 8))
    return SynthesisJob(target, SimsModel.of(base), 1, shard_nimg=40)


def make(job: QuotaJob, compute: ComputeSettings = ALONE) -> dict[str, str]:
    """Do the job; the digests of its files."""
    synthesize_quota(job, compute)
    return digests(job)


def digests(job: QuotaJob) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(local(job).glob("*.parquet"))}


def local(job: QuotaJob) -> Path:
    folder = job.folder.local
    assert folder is not None
    return folder


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}


def names(*bounds: tuple[int, int]) -> list[str]:
    return [f"slots-{first:012d}-{last:012d}.parquet" for first, last in bounds]


@pytest.fixture
def expected(images: torch.Tensor, source: AttributeSource) -> NDArray[np.int64]:
    """The seeds of a set of 150, from the images alone."""
    selection = select(AttributeClassifier.load(source)(images).numpy(), SHARES, 150)
    assert not selection.missing
    return selection.rows + FIRST_SEED


def test_the_rows_are_those_that_images_classifier_and_shares_say(
    synthesis: SynthesisJob,
    source: AttributeSource,
    images: torch.Tensor,
    expected: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 150)
    assert list(make(job)) == names((0, 63), (64, 127), (128, 149))
    rows = SampleTable(job.folder).head(150)
    assert np.array_equal(rows.ids, expected)
    assert np.array_equal(rows.images, images.numpy()[expected - FIRST_SEED])
    assert rows.attributes is not None and np.array_equal(rows.attributes, slots(SHARES, 0, 150))
    assert (rows.labels == -1).all()
    assert job.complete


def test_the_candidates_are_an_ordinary_set_with_attributes_and_soon_enough(
    synthesis: SynthesisJob, source: AttributeSource, images: torch.Tensor, expected: NDArray[np.int64], tmp_path: Path
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 150)
    synthesize_quota(job, ALONE)
    table = SampleTable(job.candidates.set.folder)
    rows = table.head(len(table))
    assert np.array_equal(rows.ids, np.arange(FIRST_SEED, FIRST_SEED + len(table)))
    assert rows.attributes is not None and set(rows.attributes.tolist()) == {-1, 0, 1}
    least = expected.max() - FIRST_SEED + 1
    assert 200 < least <= len(table) <= 2 * least and len(table) % 40 == 0


def test_the_manifest_says_what_is_in_the_set(synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, {**SHARES, 5: 0.0}, 150)
    files = make(job)
    table = SampleTable(job.folder)
    assert table.manifest["stage"] == "quota" and table.fingerprint == job.fingerprint
    assert table.manifest["settings"] == {"shares": {"0": 0.7, "1": 0.3}, "groups": {"0": [2, 3], "1": [0]}}
    classifier = hashlib.sha256(Path(source.classifier).read_bytes()).hexdigest()
    assert table.manifest["parents"] == [job.candidates.fingerprint, classifier]
    assert table.manifest["result"]["attributes"] == {"0": 105, "1": 45}
    assert (len(table), table.shape, table.num_classes, table.unlabelled) == (150, (1, 8, 8), 0, 150)
    listed = table.manifest["files"]
    assert {name: facts["sha256"] for name, facts in listed.items()} == files
    assert all((local(job) / name).stat().st_size == facts["bytes"] for name, facts in listed.items())
    assert read_metadata(local(job) / next(iter(files)))["fingerprint"] == job.fingerprint


@pytest.mark.parametrize("way", ["one round", "small files", "large files", "measured files", "other place"])
def test_the_files_do_not_depend_on_how_the_candidates_were_made(
    way: str, synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    usual = make(QuotaJob.under(tmp_path / "usual", synthesis, source, SHARES, 150))
    nimg = {"small files": 30, "large files": 500, "measured files": None}.get(way, 40)
    other = QuotaJob.under(tmp_path / "other", replace(synthesis, shard_nimg=nimg), source, SHARES, 150)
    if way == "one round":
        synthesize([replace(other.candidates, n=400)], ALONE)
    if way == "other place":
        other = replace(other, folder=Folder.at(tmp_path / "mine"))
    assert make(other) == usual


def test_a_larger_set_keeps_whole_files_and_replaces_the_last(
    synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    at_once = make(QuotaJob.under(tmp_path / "at once", synthesis, source, SHARES, 150))
    small = QuotaJob.under(tmp_path / "in steps", synthesis, source, SHARES, 70)
    assert list(make(small)) == names((0, 63), (64, 69))
    before = times(local(small))
    large = replace(small, n=150)
    assert large.fingerprint == small.fingerprint and not large.complete
    assert make(large) == at_once
    whole = names((0, 63))[0]
    assert times(local(large))[whole] == before[whole]
    assert len(SampleTable(large.folder)) == 150


@pytest.mark.parametrize("n", [150, 70, 1])
def test_what_is_there_is_not_made_again(
    n: int, synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 150)
    make(job)
    before = times(local(job))
    monkeypatch.setattr(quota, "synthesize", lambda *_: pytest.fail("sampled again"))
    make(replace(job, n=n))
    assert times(local(job)) == before


@pytest.mark.parametrize("n", [150, 20])
@pytest.mark.parametrize("fault", ["removed", "torn", "before the manifest", "torn before the manifest", "foreign"])
def test_after_a_crash_only_what_is_missing_is_made_again(
    fault: str, n: int, synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 150)
    expected = make(job)
    first, second, third = (local(job) / name for name in expected)
    before = times(local(job))
    if fault == "removed":
        first.unlink()
    else:
        first.write_bytes(first.read_bytes()[:-100])
    if "manifest" in fault or fault == "foreign":
        (local(job) / "manifest.json").unlink()
        n = 150
    if fault == "before the manifest":
        first.unlink()
    if fault == "foreign":
        write_samples(first, SampleTable(job.candidates.set.folder).rows(0, PART), {"fingerprint": job.fingerprint})
    assert make(replace(job, n=n)) == expected  # what was committed stays, even where less is asked for
    assert len(SampleTable(job.folder)) == 150
    after = times(local(job))
    assert all(after[path.name] == before[path.name] for path in (second, third))


def test_a_file_of_another_set_is_not_taken_over_though_its_rows_are_the_same(
    synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 60)
    ((name, digest),) = make(job).items()
    rows = SampleTable(job.folder).head(60)
    (local(job) / "manifest.json").unlink()
    write_samples(local(job) / name, rows, {"fingerprint": "another"})
    assert make(job) == {name: digest}


@pytest.mark.parametrize("with_manifest", [True, False])
def test_candidates_that_were_lost_are_made_again(
    with_manifest: bool, synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 70)
    expected = make(job)
    candidates = job.candidates.set.folder.local
    assert candidates is not None
    sorted(candidates.glob("seeds-*"))[1].unlink()
    if not with_manifest:
        (candidates / "manifest.json").unlink()
    for path in local(job).iterdir():
        path.unlink()
    assert make(job) == expected


def test_a_driver_with_less_to_do_does_not_undo_what_another_has_committed_meanwhile(
    synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(QuotaJob.under(tmp_path / "alone", synthesis, source, SHARES, 150))
    job = QuotaJob.under(tmp_path / "both", synthesis, source, SHARES, 150)

    def meanwhile(table: SampleTable, rows: NDArray[np.int64]) -> Samples:
        monkeypatch.setattr(quota, "gather", gather)
        synthesize_quota(job, ALONE)
        return gather(table, rows)

    monkeypatch.setattr(quota, "gather", meanwhile)
    synthesize_quota(replace(job, n=70), ALONE)
    assert job.complete and len(SampleTable(job.folder)) == 150
    assert {name: digest for name, digest in digests(job).items() if name in expected} == expected


def test_a_file_that_another_driver_has_left_for_later_slots_stays(
    synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 20)
    (later,) = names((64, 127))
    job.folder.put(later, b"of a larger set in the making")
    assert list(make(job)) == [*names((0, 19)), later]
    assert len(SampleTable(job.folder)) == 20


def test_a_set_is_named_by_what_its_rows_depend_on(
    synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 100)
    same = [
        QuotaJob.under(tmp_path, replace(synthesis, n=50, shard_nimg=7), source, {1: 0.3, 5: 0.0, 0: 0.7}, 3),
        QuotaJob.under(tmp_path, synthesis, replace(source, groups={1: (0,), 0: (2, 3)}), SHARES, 100),
    ]
    other_classifier = tmp_path / "classifier.safetensors"
    other_classifier.write_bytes(Path(source.classifier).read_bytes() + b" ")
    settings = {**synthesis.set.settings, "first_seed": 8}
    others = [
        QuotaJob.under(tmp_path, synthesis, source, {0: 0.6, 1: 0.4}, 100),
        QuotaJob.under(tmp_path, synthesis, replace(source, groups={0: (2,), 1: (0,)}), SHARES, 100),
        QuotaJob.under(tmp_path, synthesis, AttributeSource.of(other_classifier, GROUPS), SHARES, 100),
        QuotaJob.under(tmp_path, replace(synthesis, set=replace(synthesis.set, settings=settings)), source, SHARES, 9),
    ]
    assert all(other.fingerprint == job.fingerprint and other.folder == job.folder for other in same)
    prints = [job.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(prints)) == len({str(j.folder) for j in [job, *others]}) == len(prints)
    assert QuotaJob.under(tmp_path, synthesis, source, {0: 0.5, 1: 0.5}, 9).candidates == job.candidates


def refused(job: QuotaJob, sentence: str, sampled: Sequence[Any] = ()) -> None:
    with pytest.raises(SimsError, match=sentence) as caught:
        synthesize_quota(job, ALONE)
    assert "\n" not in str(caught.value)
    assert not job.folder.files()
    assert bool(job.candidates.set.folder.files()) == bool(sampled)


def test_what_cannot_end_well_is_refused_before_any_sampling(
    synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    def job(shares: dict[int, float], **changes: Any) -> QuotaJob:
        changed = replace(synthesis, set=replace(synthesis.set, **changes))
        return QuotaJob.under(tmp_path, changed, source, shares, 100)

    refused(job({0: 0.7, 5: 0.3}), r"attribute 5 has a share; the classifier sees only \[0, 1\]")
    refused(job({0: 0.7, 1: 0.2}), r"the shares add up to 0\.9")
    refused(job(SHARES, kind="latent"), "is to hold latents; decode them first")
    refused(job(SHARES, shape=(3, 8, 8)), "trained on images of 1 x any x any and these are of 3 x 8 x 8")
    refused(replace(job(SHARES), most_nimg=99), "100 rows with shares .* need about 100 candidates and 99 are allowed")
    late = {**synthesis.set.settings, "first_seed": 2**32 - 50}
    refused(job(SHARES, settings=late), "and 50 are allowed")
    with pytest.raises(SimsError, match="have no attributes; name a classifier"):
        QuotaJob(synthesis, SHARES, 100, Folder.at(tmp_path / "out"))
    with pytest.raises(SimsError, match="no classifier at"):
        QuotaJob.under(tmp_path, synthesis, AttributeSource.of(tmp_path / "absent"), SHARES, 100)


def test_too_many_candidates_are_refused_with_what_was_found(
    synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    job = replace(QuotaJob.under(tmp_path, synthesis, source, SHARES, 100), most_nimg=120)
    refused(job, r"need about \d{3} candidates and 120 are allowed \(.*\d+ of attribute 0.* in 120\)", ["sampled"])


def test_an_attribute_that_never_comes_ends_the_sampling(synthesis: SynthesisJob, tmp_path: Path) -> None:
    net = FeatureClassifier(**ARCHITECTURE)
    with torch.no_grad():
        net.head.bias[3] = -1e6
    path = tmp_path / "blind.safetensors"
    save_tensors(path, net.state_dict(), {"architecture": ARCHITECTURE})
    blind = AttributeSource.of(path, {0: (0, 1, 2), 3: (3,)})
    job = replace(QuotaJob.under(tmp_path, synthesis, blind, {0: 0.7, 3: 0.3}, 30), patience_nimg=100)
    refused(job, "attribute 3 was not seen in 120 images and 9 are needed", ["sampled"])


def test_a_folder_with_another_set_is_left_alone(
    synthesis: SynthesisJob, source: AttributeSource, tmp_path: Path
) -> None:
    job = QuotaJob.under(tmp_path, synthesis, source, SHARES, 20)
    expected = make(job)
    other = replace(QuotaJob.under(tmp_path, synthesis, source, {0: 0.5, 1: 0.5}, 20), folder=job.folder)
    with pytest.raises(SimsError, match="holds what quota made with other settings; choose another folder"):
        synthesize_quota(other, ALONE)
    assert digests(job) == expected
