"""The synthesize stage: whoever makes a set, in whatever pieces, it is the same one."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sims_ray.config import ComputeSettings, SamplerSettings
from sims_ray.config.labels import LabelSettings
from sims_ray.data.samples import Samples
from sims_ray.data.table import SampleTable
from sims_ray.data.verify import verify
from sims_ray.errors import SimsError
from sims_ray.stages.synthesize import PLAN, SHARD_BYTES, Shard, ShardWorker, SynthesisJob, synthesize
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.storage.folders import Folder
from sims_ray.storage.models import SimsModel
from sims_ray.studies.synthetic import synthesis_job
from tests.networks import SETTINGS, small_network

ALONE = ComputeSettings(num_workers=0)
STEPS = SamplerSettings(num_steps=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "base.safetensors", 0)


def checkpoint(path: Path, seed: int, **settings: object) -> Path:
    network = {**SETTINGS, "label_dim": 3, **settings}
    net = small_network(seed, label_dim=3, **settings)
    save_tensors(path, net.state_dict(), {"role": "base", "network": network, "nimg": 0})
    return path


def job(out: Path, base: Path, n: int, shard_nimg: int | None = 20, **extra: object) -> SynthesisJob:
    return synthesis_job(str(out), SimsModel.of(base), STEPS, range(7, 7 + n), shard_nimg=shard_nimg, **extra)  # type: ignore[arg-type]


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def rows(out: Path) -> Samples:
    return SampleTable(out).head(len(SampleTable(out)))


@pytest.mark.slow
def test_the_digests_are_the_same_for_one_two_and_three_workers_in_any_order(
    base: Path, tmp_path: Path, ray_cluster: ComputeSettings
) -> None:
    synthesize([job(tmp_path / "alone", base, 90)], ALONE)
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        synthesize([job(out, base, 90)], ray_cluster.model_copy(update={"num_workers": workers}))
        assert digests(out) == digests(tmp_path / "alone")


@pytest.mark.slow
def test_a_pool_that_may_grow_makes_the_same_set(base: Path, tmp_path: Path, ray_cluster: ComputeSettings) -> None:
    synthesize([job(tmp_path / "alone", base, 90)], ALONE)
    growing = ray_cluster.model_copy(update={"num_workers": 1, "max_workers": 2})
    synthesize([job(tmp_path / "growing", base, 90)], growing)
    assert digests(tmp_path / "growing") == digests(tmp_path / "alone")


def test_with_a_fixed_micro_batch_the_files_do_not_depend_on_the_batch_size(base: Path, tmp_path: Path) -> None:
    for batch in (7, 64, 256):
        compute = ALONE.model_copy(update={"sampling_batch": batch, "micro_batch": 16})
        synthesize([job(tmp_path / str(batch), base, 90, 45)], compute)
    assert digests(tmp_path / "7") == digests(tmp_path / "64") == digests(tmp_path / "256")


def test_without_one_only_the_last_bit_of_few_pixels_does(base: Path, tmp_path: Path) -> None:
    for batch in (7, 64, 256):
        synthesize([job(tmp_path / str(batch), base, 90, 45)], ALONE.model_copy(update={"sampling_batch": batch}))
    expected = rows(tmp_path / "256")
    for batch in (7, 64):
        found = rows(tmp_path / str(batch))
        assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.labels, expected.labels)
        difference = np.abs(found.images.astype(int) - expected.images.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_an_extended_set_holds_what_a_large_one_made_at_once_holds(base: Path, tmp_path: Path) -> None:
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    for n in (30, 70, 50):
        synthesize([job(grown, base, n)], ALONE)
    assert len(SampleTable(grown)) == 70
    synthesize([job(whole, base, 70)], ALONE)
    ours, theirs = rows(grown), rows(whole)
    assert np.array_equal(ours.ids, np.arange(7, 77)) and np.array_equal(ours.ids, theirs.ids)
    assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1  # batches at the seam differ
    assert np.array_equal(ours.labels, theirs.labels)


def test_a_complete_set_is_not_touched(base: Path, tmp_path: Path) -> None:
    one = job(tmp_path / "set", base, 40)
    synthesize([one], ALONE)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    synthesize([one], ALONE)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before


def test_a_torn_file_is_named_and_made_again_as_it_was(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = job(tmp_path / "set", base, 60)
    synthesize([one], ALONE)
    before = digests(tmp_path / "set")
    path = tmp_path / "set" / "seeds-000000000027-000000000046.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        synthesize([one], ALONE)
    assert path.name in caplog.text and "made again" in caplog.text
    assert digests(tmp_path / "set") == before


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(
    base: Path, tmp_path: Path
) -> None:
    import os
    import platform

    out = tmp_path / "set"
    out.mkdir()
    name = f".x.parquet.{platform.node()}-{{}}-01234567.tmp"
    dead, alive = out / name.format(2**22 + 1), out / name.format(os.getppid())
    for path in (dead, alive):
        path.write_bytes(b"half")
    synthesize([job(out, base, 20)], ALONE)
    assert not dead.exists() and alive.exists() and len(SampleTable(out)) == 20


def test_the_size_of_a_file_follows_from_the_speed_of_a_worker_and_is_kept(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    synthesize([job(out, base, 2500, None)], ALONE)
    plan = json.loads((out / PLAN).read_text())
    assert plan["n"] == 2500 and 500 <= plan["shard_nimg"] <= 625 and plan["shard_nimg"] * 64 <= SHARD_BYTES
    sizes = {name: facts["rows"] for name, facts in SampleTable(out).manifest["files"].items()}
    assert sum(sizes.values()) == 2500 and max(sizes.values()) <= plan["shard_nimg"]
    (out / PLAN).write_text(json.dumps({**plan, "shard_nimg": 111}))  # as another driver would have planned it
    (out / "manifest.json").unlink()
    (out / max(sizes)).unlink()
    synthesize([job(out, base, 2500, None)], ALONE)
    more = [facts["rows"] for name, facts in SampleTable(out).manifest["files"].items() if name not in sizes]
    assert max(more) == 111


@pytest.mark.parametrize("text", ['{"sha', "[]", '{"shard_nimg": 0}', "{}"])
def test_a_torn_plan_is_made_anew(text: str, base: Path, tmp_path: Path) -> None:
    synthesize([job(tmp_path, base, 40)], ALONE)
    (tmp_path / PLAN).write_text(text)
    synthesize([job(tmp_path, base, 60)], ALONE)
    assert json.loads((tmp_path / PLAN).read_text())["shard_nimg"] == 20 and len(SampleTable(tmp_path)) == 60


def test_files_that_are_all_there_are_committed_without_sampling(base: Path, tmp_path: Path) -> None:
    synthesize([job(tmp_path, base, 2100, 500)], ALONE)
    before = digests(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / PLAN).unlink()
    synthesize([job(tmp_path, base, 2100, None)], ALONE)
    assert {name: digest for name, digest in before.items() if name != PLAN} == digests(tmp_path)


def test_a_storage_that_fails_for_a_while_costs_no_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize([job(tmp_path, base, 60)], ALONE)
    (tmp_path / "manifest.json").unlink()
    before = digests(tmp_path)

    def fails(self: Folder, name: str) -> bytes:
        if name.startswith("seeds-"):
            raise SimsError("cannot be read (SLOW_DOWN)")
        return read(self, name)

    read = Folder.read
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", fails)
        with pytest.raises(SimsError, match="SLOW_DOWN"):
            synthesize([job(tmp_path, base, 60)], ALONE)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    "text", ['{"a', "[]", "{}", '{"files": {"x": {}}, "fingerprint": "f"}', '{"fingerprint": "f"}']
)
def test_a_torn_manifest_is_named_and_without_it_all_files_count(text: str, base: Path, tmp_path: Path) -> None:
    synthesize([job(tmp_path, base, 60)], ALONE)
    before = digests(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SimsError, match=r"manifest.json is torn; remove that file alone and run again"):
        synthesize([job(tmp_path, base, 60)], ALONE)
    (tmp_path / "manifest.json").unlink()
    synthesize([job(tmp_path, base, 60)], ALONE)
    assert digests(tmp_path) == before


def test_drivers_that_cut_a_set_differently_at_once_end_with_a_manifest_that_holds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[int] = []
    run = ShardWorker.run

    def interrupted(self: ShardWorker, shard: Shard) -> dict[str, object]:
        if not inside:
            inside.append(1)
            synthesize([job(tmp_path, base, 90, 30)], ALONE)  # another driver does all of its work just now
        return run(self, shard)

    monkeypatch.setattr(ShardWorker, "run", interrupted)
    synthesize([job(tmp_path, base, 60, 20)], ALONE)
    assert verify(SampleTable(tmp_path)).faults == () and len(SampleTable(tmp_path)) == 90
    synthesize([job(tmp_path, base, 120, 40)], ALONE)
    assert verify(SampleTable(tmp_path)).faults == ()
    assert np.array_equal(rows(tmp_path).ids, np.arange(7, 127))


def test_images_that_are_not_finite_are_refused_with_the_seed_and_not_committed(base: Path, tmp_path: Path) -> None:
    aux = checkpoint(tmp_path / "aux.safetensors", 1)
    model = SimsModel.of(base, aux, 1e308)
    one = synthesis_job(str(tmp_path / "set"), model, STEPS, range(3, 23), shard_nimg=20)
    with pytest.raises(SimsError, match="seed 3 has values that are not finite; take another sampler, or guide less"):
        synthesize([one], ALONE)
    assert not list((tmp_path / "set").glob("seeds-*"))


def test_a_folder_of_one_training_is_not_gone_on_with_by_another_of_the_same_settings(
    base: Path, tmp_path: Path
) -> None:
    one = job(tmp_path / "set", base, 40)
    synthesize([one], ALONE)
    again = checkpoint(tmp_path / "again.safetensors", 1)
    same_name = replace(one, model=SimsModel.of(again), n=60)
    with pytest.raises(SimsError, match="begun with other weights of this model; choose another folder"):
        synthesize([same_name], ALONE)


@pytest.mark.parametrize("kind", ["uniform", "probabilities", "quotas"])
def test_labels_are_those_that_were_asked_for_and_make_another_set(kind: str, base: Path, tmp_path: Path) -> None:
    given = {"probabilities": {"probabilities": [0, 0.5, 0.5]}, "quotas": {"quotas": {0: 7, 2: 3}}}.get(kind, {})
    labels = LabelSettings(kind=kind, **given)  # type: ignore[arg-type]
    one = job(tmp_path / "set", base, 60, labels=labels)
    synthesize([one], ALONE)
    zeros = int((rows(tmp_path / "set").labels == 0).sum())
    assert zeros in {"uniform": (20, 21), "probabilities": (0,), "quotas": (42,)}[kind]
    assert one.fingerprint != job(tmp_path / "set", base, 60).fingerprint
    synthesize([job(tmp_path / "other", base, 60, 13, labels=labels)], ALONE)  # whatever the files
    assert np.array_equal(rows(tmp_path / "other").labels, rows(tmp_path / "set").labels)


def test_a_latent_model_leaves_float16_latents_and_says_how_they_relate_to_pixels(tmp_path: Path) -> None:
    settings = {**SETTINGS, "img_channels": 4}
    path, latents = tmp_path / "base.safetensors", {"vae": "a/vae", "scaling_factor": 0.2, "pixel_range": [-1, 1]}
    net = small_network(0, img_channels=4)
    save_tensors(path, net.state_dict(), {"role": "base", "network": settings, "nimg": 0, "latents": latents})
    one = job(tmp_path / "set", path, 20)
    synthesize([one], ALONE)
    table = SampleTable(tmp_path / "set")
    samples = table.head(20)
    assert samples.images.dtype == np.float16 and samples.images.shape == (20, 4, 8, 8) and table.kind == "latent"
    assert table.manifest["result"]["latents"] == latents
    assert np.isfinite(samples.images).all() and samples.images.std() > 0


def test_plain_pyarrow_reads_a_file_and_finds_there_what_made_it(base: Path, tmp_path: Path) -> None:
    one = job(tmp_path / "set", base, 20)
    synthesize([one], ALONE)
    file = pq.ParquetFile(tmp_path / "set" / "seeds-000000000007-000000000026.parquet")
    schema = file.schema_arrow
    assert isinstance(schema.field("image").type, pa.FixedShapeTensorType)
    assert {schema.field(name).type for name in schema.names} == {pa.int64(), pa.int32(), schema.field("image").type}
    facts = json.loads(schema.metadata[b"sims_ray"])
    assert facts["fingerprint"] == one.fingerprint and facts["settings"] == one.set.settings
    assert facts["settings"]["sampler"]["num_steps"] == 3 and facts["nfe"] == 5
    assert str(tmp_path) not in str(schema.metadata)


def test_one_model_is_one_set_wherever_its_checkpoint_lies_and_another_one_is_refused(
    base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(base.read_bytes())
    out = tmp_path / "set"
    synthesize([job(out, base, 40)], ALONE)
    assert job(out, copy, 40).complete
    other = job(out, checkpoint(tmp_path / "other.safetensors", 1), 40)
    with pytest.raises(SimsError, match="another model; choose another folder"):
        synthesize([other], ALONE)
    (out / "manifest.json").unlink()
    before = digests(out)
    with pytest.raises(SimsError, match="choose another folder"):
        synthesize([other], ALONE)
    assert digests(out) == before


def test_two_sets_are_made_on_one_pool(base: Path, tmp_path: Path, ray_cluster: ComputeSettings) -> None:
    first, second = job(tmp_path / "a", base, 40), job(tmp_path / "b", base, 30)
    second = replace(second, set=replace(second.set, settings={**second.set.settings, "first_seed": 100}))
    synthesize([first, second], ray_cluster)
    assert first.complete and second.complete
    assert rows(tmp_path / "b").ids[0] == 100


@pytest.mark.parametrize(
    ("n", "first", "said"), [(10, 2**32 - 5, "beyond"), (10, 2**32, "beyond")], ids=["ends beyond", "begins beyond"]
)
def test_seeds_beyond_the_last_one_are_refused(n: int, first: int, said: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SimsError, match=said):
        synthesis_job(str(tmp_path), SimsModel.of(base), STEPS, range(first, first + n))
