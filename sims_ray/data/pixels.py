"""Pixels: what an entry shows without being decoded, and the array it becomes in a table."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sims_ray.data.entries import Entry, one_line
from sims_ray.data.samples import KINDS
from sims_ray.errors import SimsError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it would start Ghostscript
DEEP_MODES = ("I", "F")  # 16- and 32-bit pixels; Pillow would clip them to 8 bits
GREY_MODES = frozenset({"1", "L", "LA", "La"})
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)

Crop = Literal["none", "center"]


@dataclass(frozen=True)
class Look:
    """What can be seen of an entry from its header.

    Attributes:
        name: the entry's.
        kind: 'image' or 'latent'.
        sides: (width, height) in pixels, or (W, H, C) of a latent.
        grey: whether it is stored as grey.
    """

    name: str
    kind: str
    sides: tuple[int, ...]
    grey: bool

    def __str__(self) -> str:
        return f"{self.name} is {'x'.join(map(str, self.sides))}"


@dataclass(frozen=True)
class Geometry:
    """What every entry is brought to.

    Attributes:
        kind: 'image' or 'latent'.
        shape: (C, H, W).
        resize: whether images are resized to it.
        crop: how images become square before that.
    """

    kind: str
    shape: tuple[int, int, int]
    resize: bool
    crop: Crop

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the table's column."""
        return KINDS[self.kind]


def look_at(entry: Entry) -> Look:
    """What the header of an entry says.

    Raises:
        SimsError: it is no image that can be read.
    """
    if isinstance(entry.data, np.ndarray) and entry.data.dtype == KINDS["latent"]:
        return Look(entry.name, "latent", entry.data.shape[::-1], False)
    with _open_image(entry) as image:
        return Look(entry.name, "image", image.size, image.mode in GREY_MODES)


def decode(entry: Entry, geometry: Geometry) -> NDArray[Any]:
    """The entry as [C, H, W], uint8 or float16.

    Raises:
        SimsError: it is no image that can be read.
    """
    if geometry.kind == "latent":
        return np.asarray(entry.data)
    channels, side, _ = geometry.shape
    with _open_image(entry) as opened:
        image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
        if geometry.resize:
            if geometry.crop == "center":
                edge = min(image.size)
                left, top = (image.width - edge) // 2, (image.height - edge) // 2
                image = image.crop((left, top, left + edge, top + edge))
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        array = np.asarray(image)
    return array.reshape(side, side, -1).transpose(2, 0, 1)


@contextmanager
def _open_image(entry: Entry) -> Iterator[Image.Image]:
    """The image of an entry, lazily decoded; what fails in Pillow, here or inside the block, becomes a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _opened(entry) as image:
                if image.mode.startswith(DEEP_MODES):
                    raise SimsError(f"{entry.name} has more than 8 bits per channel ({image.mode}); convert it to 8")
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise SimsError(f"{entry.name} claims to have more than {limit} pixels; shrink or remove it") from None
    except DAMAGE as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise SimsError(f"{entry.name} is not a readable image ({reason}); repair or remove it") from None


def _opened(entry: Entry) -> Image.Image:
    data = entry.data
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[0] if len(data) == 1 else np.ascontiguousarray(data.transpose(1, 2, 0)))
    return Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
