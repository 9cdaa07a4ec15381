"""The same images in every container that the importers read."""

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from sims_ray.data.importers import import_images
from sims_ray.data.samples import Samples
from sims_ray.data.table import SampleTable

Labels = Sequence[int]


def pixels(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> NDArray[np.uint8]:
    """Random pixels [H, W, C], or [H, W] for one channel."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


def stack(n: int, channels: int = 3, side: int = 8) -> NDArray[np.uint8]:
    """Random images [N, H, W, C], or [N, H, W] for one channel."""
    return np.stack([pixels(i, side, side, channels) for i in range(n)])


def save(path: Path, array: NDArray[np.uint8], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def png(array: NDArray[np.uint8], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **options)
    return file.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def chw(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.atleast_3d(array).transpose(2, 0, 1)


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def make_zip(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """A zip with these members."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar, compressed if its name says so, with these members in this order."""
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def index(labels: Sequence[Any] | None) -> bytes:
    """EDM's dataset.json."""
    return json.dumps({"labels": labels}).encode()


def file_names(n: int) -> list[str]:
    """Names as EDM gives them."""
    return [f"{i // 1000:05d}/img{i:08d}" for i in range(n)]


def edm_zip(path: Path, images: NDArray[np.uint8], labels: Labels | None) -> Path:
    names = [f"{name}.png" for name in file_names(len(images))]
    pairs = None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]
    members = {name: png(image) for name, image in zip(names, images, strict=True)}
    return make_zip(path, {**members, "dataset.json": index(pairs)})


def webdataset(path: Path, images: NDArray[np.uint8], labels: Labels | None) -> Path:
    members = []
    for i, image in enumerate(images):
        members.append((f"train/{i:06d}.png", png(image)))
        if labels is not None:
            members.append((f"train/{i:06d}.cls", str(labels[i]).encode()))
    return make_tar(path, members)


def binary_batch(images: NDArray[np.uint8], labels: Labels) -> bytes:
    """A batch as in CIFAR-10's binary version."""
    rows = zip(labels, images.transpose(0, 3, 1, 2), strict=True)
    return b"".join(bytes([label]) + image.tobytes() for label, image in rows)


def pickled_batch(images: NDArray[np.uint8], labels: Labels) -> bytes:
    """A batch as in CIFAR-10's Python version, instruction by instruction as Python 2 writes it."""
    content = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).tobytes()
    n = len(images)
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85q\x03U\x01b\x87Rq\x04"
    shape = b"(K\x01" + _whole(n) + _whole(3072) + b"\x86"
    dtype = b"cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = array + shape + dtype + b"\x89T" + struct.pack("<i", len(content)) + content + b"tb"
    listed = b"]q\x07(" + b"".join(_whole(label) for label in labels) + b"e"
    return b"\x80\x02}q\x00(" + _text("labels") + listed + _text("data") + data + b"u."


def pickled_meta(names: Sequence[str]) -> bytes:
    """CIFAR-10's batches.meta."""
    listed = b"](" + b"".join(_text(name) for name in names) + b"e"
    return b"\x80\x02}(" + _text("num_vis") + _whole(3072) + _text("label_names") + listed + b"u."


def _text(text: str) -> bytes:
    return b"U" + bytes([len(text)]) + text.encode()


def _whole(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def imported(source: Path, **options: Any) -> Samples:
    """All rows of the table that a source becomes."""
    out = source.with_name(f"{source.name}-table")
    import_images(source, out, **options)
    table = SampleTable(out)
    return table.head(len(table))
