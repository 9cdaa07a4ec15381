"""Entries: what every source of images comes to, and how its names become labels."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sims_ray.data.samples import NO_LABEL
from sims_ray.errors import SimsError

LABEL_LIMIT = 2**31  # labels are int32
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
ARRAY_EXTENSION = ".npy"
INDEX = "dataset.json"
DRIVE = re.compile(r"[A-Za-z]:")  # of Windows
SHOWN_CHARS = 120  # of a name from an archive in a message


@dataclass(frozen=True)
class Entry:
    """One image or latent.

    Attributes:
        id: row number, or the source's own index.
        label: class, or -1 for none.
        name: where it comes from, for messages.
        data: its file, its bytes, or itself decoded: [C, H, W], uint8 with C = 1 or 3, or float16 for a latent.
    """

    id: int
    label: int
    name: str
    data: Path | bytes | NDArray[Any]


@dataclass(frozen=True)
class Source:
    """Images or latents to import.

    Attributes:
        path: folder or file.
        entries: the images in order, one in memory at a time; every call starts anew.
        classes: class names by label, where the source names them.
    """

    path: Path
    entries: Callable[[], Iterator[Entry]]
    classes: list[str] | None


def check_label(value: object, where: str) -> int:
    """The label, a whole number from -1 (none).

    Raises:
        SimsError: it is something else, or does not fit into int32.
    """
    if type(value) is not int or not NO_LABEL <= value < LABEL_LIMIT:  # type(): True and 1.0 are no labels
        raise SimsError(f"{where} has label {value!r:.80}; labels are whole numbers from 0, or -1 for none")
    return value


def one_line(error: BaseException) -> str:
    """What an error says, or its kind, fit for a sentence."""
    return shown(" ".join(str(error).split())) or type(error).__name__


def shown(name: str) -> str:
    """A name from outside, which may hold anything, fit for a message."""
    short = name if len(name) <= SHOWN_CHARS else f"{name[:SHOWN_CHARS]}..."
    return short if short.isprintable() else ascii(short)


def extension(name: str) -> str:
    """Last extension of a file's name, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether a file is none of the user's: hidden, or what macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def inner_path(name: str) -> str | None:
    """A relative path as it is on this machine, or None if on any system it leads out of its folder, or to it."""
    plain = name.replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    leads_out = plain.startswith("/") or DRIVE.match(plain) or ".." in parts
    return None if leads_out or not parts else "/".join(parts)


def listed_images(names: Collection[str]) -> list[str]:
    """The images among files, in sorted order; where there are none, the arrays."""
    for extensions in (EXTENSIONS, {ARRAY_EXTENSION}):
        if found := sorted(name for name in names if extension(name) in extensions):
            return found
    return []


def labels_by_folder(place: Path, names: Collection[str]) -> tuple[dict[str, int], list[str] | None]:
    """Labels by name, and the classes: the outermost folders in sorted order.

    Raises:
        SimsError: some images lie in folders and some do not.
    """
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    flat = [name for name in names if "/" not in name]
    if flat and classes:
        raise SimsError(f"{place} has images beside its sub-folders, like {flat[0]}; move them into a class's folder")
    if flat:
        return dict.fromkeys(flat, NO_LABEL), None
    numbers = {name: label for label, name in enumerate(classes)}
    return {name: numbers[name.split("/")[0]] for name in names}, classes or None


def labels_by_index(
    index: str, content: bytes, names: Collection[str], present: Callable[[str], bool]
) -> dict[str, int]:
    """Labels by name from EDM's dataset.json: {"labels": [["rel/path.png", 3], ...]} or {"labels": null}.

    Args:
        index: the file, for messages.
        content: its bytes.
        names: the images beside it.
        present: whether a file it names is there.

    Raises:
        SimsError: it is no such file, or does not name exactly the images that are there.
    """
    try:
        listed = json.loads(content)["labels"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise SimsError(f'{index} is not JSON of the form {{"labels": [["a.png", 3], ...]}}; correct it') from None
    if listed is None:
        return dict.fromkeys(names, NO_LABEL)
    labels: dict[str, int] = {}
    for item in listed if isinstance(listed, list) else [listed]:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
            raise SimsError(f'{index} lists {str(item)[:80]!r} in "labels"; write each as ["rel/path.png", 3]')
        name = _indexed_name(index, item[0], labels, present)
        labels[name] = check_label(item[1], f"{index}: {shown(name)}")
    if unlisted := next((name for name in names if name not in labels), None):
        raise SimsError(f"{index} has no entry for {shown(unlisted)}; give it a label (-1: none) or move the file away")
    return labels


def _indexed_name(index: str, name: str, labels: dict[str, int], present: Callable[[str], bool]) -> str:
    path = inner_path(name)
    if path is None:
        raise SimsError(f"{index} names {shown(name)}, outside its folder; list paths relative to it")
    if path in labels:
        raise SimsError(f"{index} names {shown(name)} twice; keep one entry")
    if not present(path):
        raise SimsError(f"{index} names {shown(name)}, which is not there; add the file or remove the entry")
    return path
