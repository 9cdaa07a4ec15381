"""Image tables from latent tables, by a real VAE of a few channels."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sims_ray.config import ComputeSettings
from sims_ray.data import decode as module
from sims_ray.data.contact_sheet import contact_sheet
from sims_ray.data.decode import LatentDecoder, decoded_rows
from sims_ray.data.samples import Samples, row_group_rows, write_samples
from sims_ray.data.table import SampleTable, table_result
from sims_ray.errors import SimsError
from sims_ray.stages.decode import decode_table
from sims_ray.storage.artifacts import MANIFEST, Artifact, sha256_file
from sims_ray.storage.folders import Folder
from sims_ray.storage.latents import EDM2_LATENTS, LatentSpace
from tests.storage.test_latents import save_vae

HERE = ComputeSettings(num_workers=0)
ROWS = (5, 3, 4)


def latents(n: int, first_id: int = 0, **columns: Any) -> Samples:
    random = np.random.default_rng(first_id)
    values = (0.5 * random.standard_normal((n, 4, 4, 4))).astype(np.float16)
    return Samples(np.arange(first_id, first_id + n), values, random.integers(-1, 3, n, dtype=np.int32), **columns)


def commit(folder: Path, parts: list[Samples], **result: Any) -> SampleTable:
    for i, part in enumerate(parts):
        write_samples(folder / f"part-{i:05d}.parquet", part, {"sampler": {"num_steps": 4}})
    labels = np.concatenate([part.labels for part in parts])
    facts = table_result(parts[0].images.shape[1:], labels, len(labels), parts[0].kind)
    files = {f"part-{i:05d}.parquet": {"rows": len(part)} for i, part in enumerate(parts)}
    Artifact(folder, "synthesize", {"first_seed": 0}, ("model",)).commit(files, {**facts, **result})
    return SampleTable(folder)


def three_parts() -> list[Samples]:
    firsts = np.cumsum([0, *ROWS[:-1]])
    columns = [{"weights": np.linspace(0, 1, n, dtype=np.float32), "attributes": np.arange(n)} for n in ROWS]
    return [latents(n, int(first), **column) for n, first, column in zip(ROWS, firsts, columns, strict=True)]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture
def entry(vae: str) -> dict[str, Any]:
    return {**EDM2_LATENTS, "vae": vae}


@pytest.fixture
def table(tmp_path: Path, entry: dict[str, Any]) -> SampleTable:
    return commit(tmp_path / "latents", three_parts(), latents=entry)


Decode = Callable[..., SampleTable]


@pytest.fixture
def decode(table: SampleTable, tmp_path: Path) -> Decode:
    """Decodes the table in this process; keywords go to `decode_table`."""

    def run(out: str = "images", **options: Any) -> SampleTable:
        return decode_table(table.folder.location, tmp_path / out, HERE, **options)

    return run


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.parquet"))}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


# --- what comes out


def test_a_table_decodes_as_its_rows_do_one_by_one(table: SampleTable, decode: Decode, entry: dict[str, Any]) -> None:
    decoder = LatentDecoder(LatentSpace.of(entry, "x"))
    whole, source = decode().head(sum(ROWS)), table.head(sum(ROWS))
    assert whole.images.shape == (sum(ROWS), 3, 16, 16) and whole.images.dtype == np.uint8
    assert len(np.unique(whole.images)) > 50
    for i, latent in enumerate(torch.from_numpy(source.images.copy())):
        assert np.array_equal(decoder.decode(latent[None])[0].numpy(), whole.images[i])


def test_an_image_is_what_the_vae_itself_decodes(table: SampleTable, decode: Decode, entry: dict[str, Any]) -> None:
    decoder = LatentDecoder(LatentSpace.of(entry, "x"))
    mean, std = (torch.tensor(entry[key]).reshape(1, 4, 1, 1) for key in ("raw_mean", "raw_std"))
    raw = torch.from_numpy(table.head(8).images.copy()).float() / 0.5 * std + mean
    with torch.no_grad():
        pixels = decoder.files.load().decode(raw).sample.clamp(0, 1) * 255  # type: ignore[operator]
    assert (decode().head(8).images - pixels.numpy()).max() <= 0
    assert (pixels.numpy() - decode().head(8).images).max() < 1.01


def test_every_call_of_the_vae_has_the_same_number_of_latents(entry: dict[str, Any]) -> None:
    decoder = LatentDecoder(LatentSpace.of(entry, "x"), batch_size=3)
    sizes: list[int] = []
    decoder._vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert len(decoder.decode(torch.zeros(7, 4, 4, 4))) == 7
    assert sizes == [3, 3, 3]


def test_names_ids_labels_and_further_columns_stay(table: SampleTable, decode: Decode) -> None:
    made = decode()
    assert made.file_rows == table.file_rows and made.kind == "image" and made.shape == (3, 16, 16)
    for name in table.file_rows:
        before, after = table.read(name), made.read(name)
        for field in ("ids", "labels", "weights", "attributes"):
            assert np.array_equal(getattr(before, field), getattr(after, field))
    assert (made.num_classes, made.unlabelled) == (table.num_classes, table.unlabelled)


def test_plain_pyarrow_reads_what_was_decoded(decode: Decode) -> None:
    made = decode()
    for name in made.file_rows:
        file = pq.ParquetFile(made.folder.open(name))
        assert file.schema_arrow.field("image").type == pa.fixed_shape_tensor(pa.uint8(), (3, 16, 16))
        facts = json.loads(file.schema_arrow.metadata[b"sims_ray"])
        assert facts["fingerprint"] == made.fingerprint and facts["sampler"] == {"num_steps": 4}
        assert facts["parents"] == made.manifest["parents"]


def test_few_images_are_in_memory_at_once_and_that_changes_none(
    decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decode("a").head(sum(ROWS)).images
    at_once: list[int] = []
    spied = LatentDecoder.decode

    def noting(self: LatentDecoder, part: torch.Tensor) -> torch.Tensor:
        at_once.append(len(part))
        return spied(self, part)

    monkeypatch.setattr(LatentDecoder, "decode", noting)
    monkeypatch.setattr(module, "row_group_rows", lambda shape, dtype: 2)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    made = decode("b")
    assert max(at_once) <= 2 and sum(at_once) == sum(ROWS)
    assert np.array_equal(made.head(sum(ROWS)).images, expected)
    groups = pq.ParquetFile(made.folder.open("part-00000.parquet")).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [2, 2, 1]


def test_a_file_of_many_images_has_small_row_groups(tmp_path: Path, vae: str) -> None:
    many = latents(6000)
    source = commit(tmp_path / "a", [many[:0], replace(many, images=np.zeros_like(many.images))])
    made = decode_table(source.folder.location, tmp_path / "b", HERE, vae=vae, batch_size=256)
    meta = pq.ParquetFile(made.folder.open("part-00001.parquet")).metadata
    assert max(meta.row_group(i).num_rows for i in range(2)) == row_group_rows((3, 16, 16), np.dtype(np.uint8)) < 6000
    assert len(made.read("part-00000.parquet")) == 0


def test_the_same_batch_gives_the_same_bytes_and_another_one_the_same_images_but_for_rounding(decode: Decode) -> None:
    first, again, other = decode("a"), decode("b"), decode("c", batch_size=3)
    assert digests(Path(first.folder.location)) == digests(Path(again.folder.location))
    assert first.manifest == again.manifest
    difference = np.abs(first.head(12).images.astype(int) - other.head(12).images)
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
    assert other.fingerprint == first.fingerprint


def test_a_table_is_named_by_its_latents_its_vae_and_what_lies_between(
    table: SampleTable, decode: Decode, vae: str, tmp_path: Path
) -> None:
    copied = shutil.copytree(vae, tmp_path / "copy")
    assert decode("a").manifest["parents"] == [table.fingerprint]
    same = {decode("a").fingerprint, decode("b", vae=str(copied)).fingerprint}
    others = [
        decode("c", latents="{scaling_factor: 0.2}", vae=vae).fingerprint,
        decode("d", vae=save_vae(tmp_path / "other", 1)).fingerprint,
        decode("e", vae=vae, latents="edm2").fingerprint,
    ]
    assert len(same) == 1 and others[2] in same and len({*same, *others}) == 3


def test_what_the_latents_are_is_not_handed_on_to_the_images(decode: Decode) -> None:
    assert "latents" not in decode().manifest["result"]


def test_rows_of_latents_make_a_contact_sheet(table: SampleTable, entry: dict[str, Any]) -> None:
    images = decoded_rows(table.rows(2, 8), LatentDecoder(LatentSpace.of(entry, "x")))
    assert contact_sheet(images, columns=3, scale=1).size == (3 * 17 - 1, 2 * 17 - 1)


# --- going on


def test_a_second_run_changes_nothing(decode: Decode, tmp_path: Path) -> None:
    decode()
    before = stamps(tmp_path / "images")
    decode()
    assert stamps(tmp_path / "images") == before


def tear(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a flipped bit":
        middle = len(content) // 3
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "missing":
        path.unlink()
    elif how == "of another set":
        metadata = {b"sims_ray": json.dumps({"fingerprint": "other"}).encode()}
        pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    elif how == "without a row":
        table = pq.read_table(path)
        pq.write_table(table.slice(1), path)


WAYS = ["cut off", "empty", "a flipped bit", "missing", "of another set", "without a row"]


@pytest.mark.parametrize("how", WAYS)
def test_before_the_commit_whole_files_are_kept_and_torn_ones_remade(decode: Decode, tmp_path: Path, how: str) -> None:
    whole, folder = decode("whole"), tmp_path / "images"
    decode()
    (folder / MANIFEST).unlink()
    tear(folder / "part-00001.parquet", how)
    before = stamps(folder)
    made = decode()
    after = stamps(folder)
    assert after["part-00000.parquet"] == before["part-00000.parquet"]
    assert after["part-00002.parquet"] == before["part-00002.parquet"]
    assert digests(folder) == digests(tmp_path / "whole") and made.manifest == whole.manifest


@pytest.mark.parametrize("how", ["cut off", "missing"])
def test_after_the_commit_a_file_of_another_size_is_remade(decode: Decode, tmp_path: Path, how: str) -> None:
    whole = decode("whole")
    decode()
    tear(tmp_path / "images" / "part-00001.parquet", how)
    assert decode().manifest == whole.manifest
    assert digests(tmp_path / "images") == digests(tmp_path / "whole")


def test_after_the_commit_files_are_known_by_their_size_and_not_read_again(decode: Decode, tmp_path: Path) -> None:
    decode()
    tear(tmp_path / "images" / "part-00001.parquet", "a flipped bit")
    before = stamps(tmp_path / "images")
    decode()
    assert stamps(tmp_path / "images") == before


def test_a_table_that_grew_is_decoded_where_it_grew(
    table: SampleTable, decode: Decode, tmp_path: Path, entry: dict[str, Any]
) -> None:
    decode()
    before = stamps(tmp_path / "images")
    commit(Path(table.folder.location), [*three_parts(), latents(2, sum(ROWS))], latents=entry)
    made = decode()
    after = stamps(tmp_path / "images")
    assert len(made) == sum(ROWS) + 2
    assert all(after[name] == stamp for name, stamp in before.items() if name != MANIFEST)


def test_several_workers_make_the_same_files(
    ray_cluster: ComputeSettings, table: SampleTable, decode: Decode, tmp_path: Path
) -> None:
    here, there = decode("here"), decode_table(table.folder.location, tmp_path / "there", ray_cluster)
    assert digests(tmp_path / "here") == digests(tmp_path / "there") and here.manifest == there.manifest


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a real S3 server on loopback."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    facts = {
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "ENDPOINT_URL": f"http://{host}:{port}",
        "REGION": "us-east-1",
    }
    for name, value in facts.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"decode-{uuid.uuid4().hex[:8]}"
    urlopen(Request(f"http://{host}:{port}/{name}", method="PUT")).close()
    yield f"s3://{name}"
    server.stop()


def test_tables_may_lie_in_an_object_store(table: SampleTable, decode: Decode, bucket: str, tmp_path: Path) -> None:
    near, source, target = decode(), Folder.at(f"{bucket}/latents"), Folder.at(f"{bucket}/images")
    for name in table.folder.files():
        source.put(name, table.folder.read(name))
    for _ in range(2):
        far = decode_table(source.location, target.location, HERE)
        assert {name: facts["sha256"] for name, facts in far.manifest["files"].items()} == digests(tmp_path / "images")
        assert far.fingerprint == near.fingerprint and np.array_equal(far.head(9).images, near.head(9).images)
        target.put("part-00001.parquet", b"torn")


# --- what cannot be decoded


def refused(reason: str, act: Callable[[], object]) -> str:
    with pytest.raises(SimsError, match=reason) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_is_not_finite_is_named_and_leaves_no_image(
    tmp_path: Path, entry: dict[str, Any], value: float
) -> None:
    parts = three_parts()
    parts[1].images[2, 1, 0, 3] = value
    source = commit(tmp_path / "latents", parts, latents=entry)
    words = refused("the latent of id 7 in", lambda: decode_table(source.folder.location, tmp_path / "out", HERE))
    assert "part-00001.parquet has values that are not finite" in words
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-00000.parquet"]


def test_a_latent_far_from_any_image_is_no_silent_black(table: SampleTable, vae: str, tmp_path: Path) -> None:
    def run() -> None:
        decode_table(table.folder.location, tmp_path / "out", HERE, vae=vae, latents="{scaling_factor: 1.0e-39}")

    refused("decoded image of row 0 has values that are not finite", run)


def test_what_is_no_table_of_these_latents_is_refused_before_any_work(
    tmp_path: Path, table: SampleTable, vae: str, decode: Decode
) -> None:
    source, out = table.folder.location, tmp_path / "out"
    images = replace(latents(2), images=np.zeros((2, 3, 4, 4), np.uint8))
    wide = replace(latents(2), images=np.zeros((2, 3, 4, 4), np.float16))
    commit(tmp_path / "pictures", [images])
    commit(tmp_path / "wide", [wide])
    commit(tmp_path / "silent", [latents(2)])
    refused("holds images already", lambda: decode_table(tmp_path / "pictures", out, HERE, vae=vae))
    refused("the latents have 3 channels", lambda: decode_table(tmp_path / "wide", out, HERE, vae=vae))
    refused("does not say how its latents relate", lambda: decode_table(tmp_path / "silent", out, HERE))
    refused("holds the latents themselves", lambda: decode_table(source, source, HERE))
    refused("has no manifest.json", lambda: decode_table(tmp_path / "nothing", out, HERE))
    assert not out.exists()
    refused("holds another table, made by synthesize", lambda: decode_table(source, tmp_path / "silent", HERE))


def test_statistics_of_other_channels_than_the_vae_takes_are_refused(vae: str) -> None:
    space = LatentSpace.of({"vae": vae, "raw_mean": [0, 0, 0], "raw_std": [1, 1, 1]}, "x")
    refused("the latents have 3 channels", lambda: LatentDecoder(space))


def test_a_file_of_latents_that_is_damaged_is_named(table: SampleTable, decode: Decode, tmp_path: Path) -> None:
    tear(Path(table.folder.location) / "part-00002.parquet", "a flipped bit")
    refused(r"part-00002.parquet cannot be read", decode)
    assert not (tmp_path / "images" / MANIFEST).exists()


def test_another_vae_where_a_worker_looks_is_refused(table: SampleTable, vae: str, tmp_path: Path) -> None:
    from sims_ray.data.decode import DecodeJob
    from sims_ray.stages.decode import DecodeWorker

    space = LatentSpace.of({**EDM2_LATENTS, "vae": vae}, "x")
    job = DecodeJob(table.folder.location, str(tmp_path / "out"), space, "0" * 64, table.fingerprint)
    refused("holds another VAE here", lambda: DecodeWorker(job, 8, HERE))
