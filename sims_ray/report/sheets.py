"""Contact sheets of the same seeds: of the compared models, and along the strength for the page's slider."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims_ray.data.contact_sheet import contact_sheet
from sims_ray.errors import SimsError
from sims_ray.report.numbers import short
from sims_ray.report.trials import OMEGA

Images = NDArray[np.uint8]  # [N, C, H, W]
FILE_SIDE_PIXELS = 2048  # a sheet beside the page shows the first images that fit into this square
PAGE_SIDE_PIXELS = 1024  # in the page
PAGE_ACROSS = 8  # images in a row of a sheet in the page at most
PREVIEWS_BYTES = 2_000_000  # of all sheets of the compared models in the page; in base64 a third more
MORPH_BYTES = 3_500_000  # of all sheets of the slider
SMALL_PIXELS = 64  # images up to this size are magnified without smoothing


@dataclass(frozen=True)
class Frame:
    """A step of the slider.

    Attributes:
        omega: the strength.
        side: where it lies, like "the base".
        png: the sheet.
        landmark: short name of a step that a button leads to; empty for the steps between.
    """

    omega: float
    side: str
    png: bytes
    landmark: str

    @property
    def words(self) -> str:
        """What the slider says."""
        return f"{OMEGA} = {short(self.omega)}: {self.side}"

    @property
    def file(self) -> str:
        """Name of its PNG."""
        return f"morph_omega_{self.omega:g}.png"


@dataclass(frozen=True)
class Morph:
    """The frames by rising strength, each of the first `shown` of `total` images; `start` is the chosen one."""

    frames: tuple[Frame, ...]
    start: int
    shown: int
    total: int
    small: bool


@dataclass(frozen=True)
class Sheets:
    """The sheets of the compared models in the page: model -> PNG, each of the first `shown` images."""

    pngs: Mapping[str, bytes]
    shown: int
    small: bool


def page_sheets(previews: Mapping[str, Images]) -> Sheets:
    """The sheets of the compared models, as many images of each as the page has room for.

    Raises:
        SimsError: a preview is not an image batch.
    """
    pngs, shown = fitted_sheets(list(previews.values()), PREVIEWS_BYTES)
    return Sheets(dict(zip(previews, pngs, strict=True)), shown, is_small(*previews.values()))


def file_sheets(previews: Mapping[str, Images]) -> dict[str, bytes]:
    """The PNG files of the compared models by name, large ones included."""
    return {f"samples-{slug(model)}.png": _file_sheet(images) for model, images in previews.items()}


def morph_of(values: Mapping[str, Any]) -> Morph:
    """The slider's frames.

    Args:
        values: `omegas`, `images` uint8 [len(omegas), N, C, H, W] of the same seeds, and the `selected` omega.

    Raises:
        SimsError: there is not one image batch per omega, or the selected omega is none of them.
    """
    omegas, images, selected = [float(omega) for omega in values["omegas"]], values["images"], values["selected"]
    if not omegas or images.ndim != 5 or len(images) != len(omegas):
        found = f"{len(omegas)} strengths and images {list(images.shape)}"
        raise SimsError(f"the morph has {found}; give images [strengths, N, C, H, W], a batch for each strength")
    if selected not in omegas or len(set(omegas)) < len(omegas):
        raise SimsError(
            f"the morph's strengths {omegas} need the chosen one, {selected}, and no value twice; change them"
        )
    order = sorted(range(len(omegas)), key=omegas.__getitem__)
    pngs, shown = fitted_sheets([images[i] for i in order], MORPH_BYTES)
    frames = tuple(_frame(omegas[i], float(selected), png) for i, png in zip(order, pngs, strict=True))
    start = sorted(omegas).index(selected)
    return Morph(frames, start, shown, images.shape[1], is_small(images[0]))


def fitted_sheets(batches: Sequence[Images], limit_bytes: int) -> tuple[list[bytes], int]:
    """A square sheet of the first images of each batch, and how many: what fits into the limit, one at least.

    Args:
        batches: each uint8 [N, C, H, W]; the fewest images of any are the most that are shown.
        limit_bytes: of all sheets together.
    """
    if not batches:
        return [], 0
    fewest, side = min(map(len, batches)), max(max(batch.shape[-2:]) for batch in batches)
    across = max(1, min(PAGE_ACROSS, PAGE_SIDE_PIXELS // side, math.ceil(math.sqrt(fewest))))
    while True:
        shown = min(fewest, across * across)
        pngs = [_png(batch[:shown], across) for batch in batches]
        total = sum(map(len, pngs))
        if total <= limit_bytes or across == 1:
            return pngs, shown
        across = max(1, min(across - 1, math.floor(across * math.sqrt(limit_bytes / total))))


def is_small(*batches: Images) -> bool:
    """Whether the pixels are to be seen as squares."""
    return all(max(batch.shape[-2:]) <= SMALL_PIXELS for batch in batches)


def data_uri(png: bytes) -> str:
    """A PNG as text that an `img` shows without a file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-")


def side_of(omega: float, selected: float) -> str:
    """Where a strength lies between auxiliary, base and chosen."""
    named = {-1.0: "the auxiliary alone", 0.0: "the base", selected: "the chosen strength"}
    if omega in named:
        return named[omega]
    if omega < -1:
        return "beyond the auxiliary"
    if omega < 0:
        return "between auxiliary and base"
    return "between base and chosen" if omega < selected else "beyond the chosen strength"


def _frame(omega: float, selected: float, png: bytes) -> Frame:
    landmark = {-1.0: "auxiliary", 0.0: "base", selected: "chosen"}.get(omega, "")
    return Frame(omega, side_of(omega, selected), png, landmark)


def _file_sheet(images: Images) -> bytes:
    across = max(1, FILE_SIDE_PIXELS // max(images.shape[-2:]))
    return _png(images[: across * across])


def _png(images: Images, across: int | None = None) -> bytes:
    buffer = io.BytesIO()
    contact_sheet(images, across).save(buffer, format="PNG")
    return buffer.getvalue()
