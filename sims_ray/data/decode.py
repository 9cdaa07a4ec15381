"""Image tables from latent tables, file by file: the same names, ids, labels and further columns.

A file is a pure function of the latent file, the VAE's weights and how latents relate to pixels, up to what the
device's arithmetic makes of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sims_ray.data.samples import METADATA_KEY, SCHEMA_VERSION, Samples, row_group_rows, to_samples
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST, fingerprint, new_manifest, read_manifest, to_json
from sims_ray.storage.beside import atomic_path
from sims_ray.storage.folders import Folder
from sims_ray.storage.latents import LatentSpace
from sims_ray.storage.vae import VaeFiles

STAGE = "decode"
BATCH_SIZE = 8
CHUNK_BYTES = 64 << 20  # of pixels in memory at once
READ_ROWS = 64  # at a time, where a file is only checked
PIXEL = np.dtype(np.uint8)


class LatentDecoder:
    """Turns latents into images, in batches of one size so that no image depends on those decoded with it.

    Args:
        space: how the latents relate to pixels.
        device: where to decode.
        batch_size: latents per call of the VAE; fewer are padded.

    Raises:
        SimsError: the VAE cannot be found or loaded, or has other channels than `space`.
    """

    def __init__(self, space: LatentSpace, device: str = "cpu", batch_size: int = BATCH_SIZE) -> None:
        self.space, self.device, self.batch_size = space, device, batch_size
        self.files = VaeFiles.find(space.vae)
        if len(space.scale) > 1:
            self.files.image_shape((len(space.scale), 1, 1))
        self._vae: Any = self.files.load().to(device)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [B, C, H, W] on the host from the model's latents [B, c, h, w], float16 or float32.

        Raises:
            ValueError: a latent has values that are not finite, or its image has; names its row.
            SimsError: the VAE takes another number of channels.
        """
        images = torch.empty(len(latents), *self.files.image_shape(tuple(latents.shape[1:])), dtype=torch.uint8)
        for start in range(0, len(latents), self.batch_size):
            part = latents[start : start + self.batch_size].to(self.device, torch.float32)
            _check_finite(part, "the latent", start)
            padded = F.pad(part, (0, 0, 0, 0, 0, 0, 0, self.batch_size - len(part)))
            decoded = self._vae.decode(self.space.to_raw(padded)).sample[: len(part)]
            _check_finite(decoded, "the decoded image", start)
            images[start : start + len(part)] = self.space.to_uint8(decoded).cpu()
        return images


def decoded_rows(samples: Samples, decoder: LatentDecoder, where: str = "the table") -> NDArray[np.uint8]:
    """Images uint8 [N, C, H, W] of rows of a latent table; `where` is for messages.

    Raises:
        SimsError: the rows hold images, or latents that cannot be decoded.
    """
    if samples.kind != "latent":
        raise SimsError(f"{where} holds images already; give a table of latents")
    finite = np.isfinite(samples.images).all(axis=(1, 2, 3))
    if not finite.all():
        found = f"the latent of id {samples.ids[int(finite.argmin())]} in {where} has values that are not finite"
        raise SimsError(f"{found}; remove the file and make it again")
    try:
        return decoder.decode(torch.from_numpy(samples.images.copy())).numpy()
    except ValueError as error:
        raise SimsError(f"{where}: {error}, although the latent is; is it the VAE of these latents?") from None


@dataclass(frozen=True)
class DecodeJob:
    """One image table to make from a latent table.

    Attributes:
        source: location of the latent table.
        target: location of the image table.
        space: how the latents relate to pixels.
        vae: identity of the VAE's files.
        parent: fingerprint of the latent table.
    """

    source: str
    target: str
    space: LatentSpace
    vae: str
    parent: str

    @property
    def settings(self) -> dict[str, Any]:
        """What the images depend on beside the latents."""
        return {"vae": self.vae, "latents": self.space.settings()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the settings and the latent table's fingerprint."""
        return fingerprint(STAGE, self.settings, [self.parent])

    def survey(self, table: SampleTable) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Facts of the files of `table` that lie decoded in the target, and what is wrong with those that are torn.

        Files that the manifest lists are known by their size; the others are read.

        Raises:
            SimsError: the target holds something else.
        """
        folder = Folder.at(self.target)
        sizes, listed = folder.files(), self._listed()
        kept, torn = {}, {}
        for name in table.file_rows:
            if name not in sizes:
                continue
            facts = listed.get(name)
            if facts is not None and facts["bytes"] != sizes[name]:
                torn[name] = f"is {sizes[name]:,} bytes, its manifest says {facts['bytes']:,}"
            elif (found := facts or self._checked(name)) is None:
                torn[name] = "is torn or not of this table"
            else:
                kept[name] = found
        return kept, torn

    def commit(self, table: SampleTable, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the manifest over these files, unless it says so already."""
        if self._listed() == files:
            return
        shape = VaeFiles.find(self.space.vae).image_shape(table.shape)
        result = {**table.manifest["result"], "shape": list(shape), "kind": "image"}
        result.pop("latents", None)
        known = table.manifest["files"]
        entries = {name: {**known[name], **facts} for name, facts in files.items()}
        manifest = new_manifest(STAGE, self.settings, [self.parent], entries, result)
        Folder.at(self.target).put(MANIFEST, to_json(manifest).encode())

    def _listed(self) -> dict[str, dict[str, Any]]:
        """The files of the manifest; none without one."""
        folder = Folder.at(self.target)
        if folder.size(MANIFEST) is None:
            return {}
        manifest = read_manifest(folder)
        if manifest.get("fingerprint") != self.fingerprint:
            found = f"{folder} holds another table, made by {manifest.get('stage')}"
            raise SimsError(f"{found} from other data or with other settings; choose another folder")
        return {
            name: {key: facts[key] for key in ("rows", "bytes", "sha256")} for name, facts in manifest["files"].items()
        }

    def _checked(self, name: str) -> dict[str, Any] | None:
        """Facts of a file after all of it was read; None if it is torn or of another table."""
        folder = Folder.at(self.target)
        try:
            with folder.open(name) as file, Folder.at(self.source).open(name) as latents:
                parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
                facts = json.loads((parquet.schema_arrow.metadata or {})[METADATA_KEY])
                ids = [batch["id"].to_numpy() for batch in parquet.iter_batches(READ_ROWS)]
                wanted = pq.ParquetFile(latents).read(["id"])["id"].to_numpy()
        except (pa.ArrowException, KeyError, OSError, ValueError):
            return None
        found = np.concatenate([np.empty(0, np.int64), *ids])
        if facts.get("fingerprint") != self.fingerprint or not np.array_equal(found, wanted):
            return None
        return {"rows": len(found), "bytes": folder.size(name), "sha256": folder.sha256(name)}


def decode_file(job: DecodeJob, name: str, decoder: LatentDecoder) -> dict[str, Any]:
    """Leave the images of one file of latents, whole or not at all, with a few megabytes of them in memory.

    Returns its `rows`, `bytes` and `sha256`.

    Raises:
        SimsError: the file cannot be read, or holds latents that cannot be decoded.
    """
    where, rows = f"{Folder.at(job.source)}/{name}", 0
    with _written_whole(Folder.at(job.target), name) as path, _read(job.source, name, where) as latents:
        if "latent" not in latents.schema_arrow.names:
            raise SimsError(f"{where} has no column `latent`; give a table of latents")
        at = latents.schema_arrow.get_field_index("latent")
        shape = decoder.files.image_shape(tuple(latents.schema_arrow.field(at).type.shape))
        schema, group = _image_schema(latents.schema_arrow, at, shape, job), row_group_rows(shape, PIXEL)
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for part in _parts(latents, max(1, CHUNK_BYTES // (group * math.prod(shape))) * group, where):
                images = decoded_rows(to_samples(part), decoder, where)
                column = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
                part = part.set_column(at, schema.field(at), column).replace_schema_metadata(schema.metadata)
                writer.write_table(part, row_group_size=group)
                rows += len(images)
    # After the block, so that these are the bytes that lie in the folder.
    folder = Folder.at(job.target)
    return {"rows": rows, "bytes": folder.size(name), "sha256": folder.sha256(name)}


def _image_schema(schema: pa.Schema, at: int, shape: tuple[int, int, int], job: DecodeJob) -> pa.Schema:
    """The schema of the latents' file, with images in their place and what made them in the metadata."""
    facts = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    facts |= {"schema_version": SCHEMA_VERSION, "fingerprint": job.fingerprint, "parents": [job.parent]}
    facts[STAGE] = job.settings
    image = pa.field("image", pa.fixed_shape_tensor(pa.uint8(), shape))
    return schema.set(at, image).with_metadata({METADATA_KEY: json.dumps(facts, sort_keys=True).encode()})


@contextmanager
def _read(source: str, name: str, where: str) -> Iterator[pq.ParquetFile]:
    """An open file of latents."""
    try:
        file = Folder.at(source).open(name)
        parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(where, error) from None
    with file:
        yield parquet


def _parts(parquet: pq.ParquetFile, rows: int, where: str) -> Iterator[pa.Table]:
    """The rows of a file, so many at a time."""
    try:
        for batch in parquet.iter_batches(rows):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(where, error) from None


def _unreadable(where: str, error: Exception) -> SimsError:
    return SimsError(f"{where} cannot be read ({' '.join(str(error).split())}); restore it or make it again")


def _check_finite(values: Tensor, what: str, start: int) -> None:
    finite = values.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(f"{what} of row {start + int(finite.int().argmin())} has values that are not finite")


@contextmanager
def _written_whole(folder: Folder, name: str) -> Iterator[Path]:
    """A path to write to, whose file then appears in the folder."""
    if folder.local is not None:
        with atomic_path(folder.local / name) as beside:
            yield beside
        return
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        yield path
        with pa.memory_map(str(path)) as content:
            folder.put(name, content.read_buffer())
