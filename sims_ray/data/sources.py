"""Sources of images: what a path holds, found from its content, becomes a stream of labelled entries."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sims_ray.data.archives import GZIP, CheckedZip, tar_members
from sims_ray.data.arrays import NPY, array_source, read_array
from sims_ray.data.entries import (
    ARRAY_EXTENSION,
    EXTENSIONS,
    INDEX,
    Entry,
    Source,
    extension,
    is_hidden,
    labels_by_folder,
    labels_by_index,
    listed_images,
    shown,
)
from sims_ray.data.parquet_source import parquet_source
from sims_ray.data.webdataset import webdataset_source
from sims_ray.errors import SimsError

KNOWN = "a folder of images, Parquet, .npy, .npz, an EDM zip, or a tar of CIFAR-10 or WebDataset"
TARS = (".tar", ".tar.gz", ".tgz")
HEAD_BYTES = 512
INDEX_BYTES = 1 << 30  # of dataset.json in a zip: 60 MB for ImageNet
TAR_MAGIC = slice(257, 262), b"ustar"
ZIPS = (b"PK\x03\x04", b"PK\x05\x06")
CIFAR10_BATCH = re.compile(r"^(.*/)?(data_batch_\d+|test_batch)(\.bin)?$")


def find_source(source: Path) -> Source:
    """What a path holds; reads names and labels only, and checks the rest as its entries are read.

    Raises:
        SimsError: nothing that can be imported, or names or labels that cannot be used.
    """
    if source.is_dir():
        return _folder_source(source)
    if not source.is_file():
        found = "is neither a folder nor a file" if source.exists() else "does not exist"
        raise SimsError(f"{source} {found}; give {KNOWN}")
    head, suffix = _read(source, HEAD_BYTES), source.suffix.lower()
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return parquet_source(source, [source])
    if suffix in (".npy", ".npz") or head.startswith(NPY):
        return array_source(source)
    if suffix == ".zip" or head.startswith(ZIPS):
        return _zip_source(source)
    where, magic = TAR_MAGIC
    if source.name.lower().endswith(TARS) or head.startswith(GZIP) or head[where] == magic:
        return _tar_source(source, [source])
    raise SimsError(f"{source} is neither a folder nor a file of a known kind; give {KNOWN}")


def _read(path: Path, limit_bytes: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes)
    except OSError as error:
        raise SimsError(f"{path} cannot be read ({error.strerror}); make it readable") from None


def _folder_source(folder: Path) -> Source:
    names = _files_in(folder)
    images = listed_images(names)
    parquet = sorted(folder.glob("*.parquet"))
    tars = sorted(folder / name for name in names if "/" not in name and name.lower().endswith(TARS))
    kinds = [images, [path.name for path in parquet], [path.name for path in tars]]
    if len(found := [names[0] for names in kinds if names]) > 1:
        raise SimsError(f"{folder} holds both {found[1]} and {found[0]}; keep them in separate folders")
    if parquet:
        return parquet_source(folder, parquet)
    return _tar_source(folder, tars) if tars else _image_source(folder, images)


def _files_in(folder: Path) -> list[str]:
    def unreadable(error: OSError) -> None:
        raise SimsError(f"{error.filename} cannot be listed ({error.strerror}); make it readable")

    names = []
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        relative = Path(root).relative_to(folder)
        names += [(relative / name).as_posix() for name in files if not is_hidden(name)]
    return names


def _image_source(folder: Path, images: Sequence[str]) -> Source:
    index, classes = folder / INDEX, None
    if index.is_file():
        labels = labels_by_index(str(index), _read(index), images, lambda name: (folder / name).is_file())
    else:
        labels, classes = labels_by_folder(folder, images)

    def entries() -> Iterator[Entry]:
        for i, name in enumerate(sorted(labels)):
            path = folder / name
            data = read_array(_read(path), str(path)) if extension(name) == ARRAY_EXTENSION else path
            yield Entry(i, labels[name], str(path), data)

    return Source(folder, entries, classes)


def _zip_source(path: Path) -> Source:
    """Images, or latents as .npy, in a zip; labelled as in a folder."""
    with CheckedZip(path) as archive:
        members = archive.members
        images, classes = listed_images(members), None
        if INDEX in members:
            content = archive.read(INDEX, INDEX_BYTES)
            labels = labels_by_index(f"{path}: {INDEX}", content, images, lambda name: name in members)
        elif deeper := next((name for name in members if name.endswith(f"/{INDEX}")), None):
            raise SimsError(f"{path}: {shown(deeper)} lies in a sub-folder; make the zip from inside that folder")
        else:
            labels, classes = labels_by_folder(path, images)

    def entries() -> Iterator[Entry]:
        with CheckedZip(path) as archive:
            for i, name in enumerate(sorted(labels)):
                where, content = f"{path}: {shown(name)}", archive.read(name)
                data = read_array(content, where) if extension(name) == ARRAY_EXTENSION else content
                yield Entry(i, labels[name], where, data)

    return Source(path, entries, classes)


def _tar_source(path: Path, tars: Sequence[Path]) -> Source:
    """CIFAR-10 or WebDataset, whichever the first member that tells them apart belongs to."""
    for tar in tars:
        for member in tar_members(tar):
            if CIFAR10_BATCH.match(member.name) and len(tars) > 1:
                raise SimsError(f"{path} holds {tar.name}, which is CIFAR-10, and other tar files; give one file")
            if CIFAR10_BATCH.match(member.name):
                from sims_ray.data.cifar import cifar10_source  # here because it brings torch, which takes seconds

                return cifar10_source(tar)
            if extension(member.name) in EXTENSIONS:
                return webdataset_source(path, tars)
    raise SimsError(f"{path} holds no images; give {KNOWN}")
