"""CIFAR-10 as its authors publish it: a tar of five training batches and a test batch, pickled or binary.

The training batches are read, in the order of their numbers; the test batch only where there is nothing else. The
pickles are never unpickled: their instructions are read by an interpreter that imports nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims_ray.data.archives import Member, tar_members
from sims_ray.data.entries import Entry, Source
from sims_ray.errors import SimsError
from sims_ray.storage.nvlabs.objects import NUMPY_GLOBALS, Array
from sims_ray.storage.nvlabs.reader import Refusal, run_pickle

TRAINING = re.compile(r"data_batch_(\d+)(\.bin)?")
TEST = re.compile(r"test_batch(\.bin)?")
META = ("batches.meta", "batches.meta.txt")
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
CLASSES = 10


def cifar10_source(path: Path) -> Source:
    """The training images of a CIFAR-10 tar, with the class names in it.

    Raises:
        SimsError: a batch is missing or not as CIFAR-10 has it.
    """
    training: dict[int, str] = {}
    test: list[str] = []
    classes: list[str] | None = None
    for member in tar_members(path):
        base = PurePosixPath(member.name).name
        if found := TRAINING.fullmatch(base):
            if training.setdefault(int(found[1]), member.name) != member.name:
                raise SimsError(f"{member.where} is there as {training[int(found[1])]} already; keep one of them")
        elif TEST.fullmatch(base):
            test.append(member.name)
        elif base in META:
            classes = _class_names(member)
    if training and max(training) != len(training):
        raise SimsError(f"{path} has data_batch_{max(training)} but not all before it; fetch it again")
    names = [training[number] for number in sorted(training)] or test[:1]
    return Source(path, lambda: _entries(path, names), classes)


def _entries(path: Path, names: list[str]) -> Iterator[Entry]:
    running = 0
    for member in _in_order(path, names):
        images, labels = _binary(member) if member.name.endswith(".bin") else _pickled(member)
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            if not 0 <= label < CLASSES:
                raise SimsError(f"{member.where} image {row} has label {label}; those of CIFAR-10 are 0 to 9")
            yield Entry(running, int(label), f"{member.where} image {row}", image)
            running += 1


def _in_order(path: Path, names: list[str]) -> Iterator[Member]:
    """The members with these names in this order, in as many passes over the tar as that takes."""
    left = list(names)
    while left:
        before = len(left)
        for member in tar_members(path):
            if left and member.name == left[0]:
                yield member
                del left[0]
        if len(left) == before:
            raise SimsError(f"{path} has changed while it was read: {left[0]} is gone; import it again")


def _binary(member: Member) -> tuple[NDArray[np.uint8], list[int]]:
    """Images [N, 3, 32, 32] and labels [N]: each image is a byte for the label and 3,072 for the pixels."""
    content = member.read()
    if len(content) % (1 + PIXELS):
        raise SimsError(f"{member.where} has {len(content)} bytes, no multiple of {1 + PIXELS}; fetch it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    return rows[:, 1:].reshape(-1, *SHAPE), rows[:, 0].tolist()


def _pickled(member: Member) -> tuple[NDArray[np.uint8], list[int]]:
    batch = _unpacked(member)
    held = batch.get("data") if type(batch) is dict else None
    if not isinstance(held, Array) or "labels" not in batch:
        raise SimsError(f"{member.where} has no `data` and `labels` as CIFAR-10 has them; fetch it again")
    try:
        images, labels = held.values(), batch["labels"]
    except (TypeError, ValueError):
        raise SimsError(f"{member.where} has images whose bytes do not make up their shape; fetch it again") from None
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != PIXELS:
        raise SimsError(f"{member.where} has images {images.dtype} {list(images.shape)}, not uint8 [N, {PIXELS}]")
    if type(labels) is not list or any(type(label) is not int for label in labels) or len(labels) != len(images):
        raise SimsError(f"{member.where} has {len(images)} images but not as many whole numbers as labels")
    return images.reshape(-1, *SHAPE), labels


def _class_names(member: Member) -> list[str]:
    if member.name.endswith(".txt"):
        names: Any = member.read().decode(errors="replace").split()
    else:
        meta = _unpacked(member)
        names = meta.get("label_names") if type(meta) is dict else None
    if type(names) is not list or len(names) != CLASSES or any(type(name) is not str for name in names):
        raise SimsError(f"{member.where} does not name {CLASSES} classes; fetch it again")
    return names


def _unpacked(member: Member) -> Any:
    try:
        return run_pickle(BytesIO(member.read()), NUMPY_GLOBALS, kind="CIFAR-10 batch", strings=True)
    except Refusal as refusal:
        raise SimsError(f"{member.where} {refusal}") from None
