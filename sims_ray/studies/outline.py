"""A run's plan where the images need not be there yet: their shape is given, or known from the recipe."""

from __future__ import annotations

from pathlib import Path

from sims_ray.config import Recipe, presets
from sims_ray.data.samples import IMAGE_CHANNELS
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import Store
from sims_ray.storage.folders import Folder
from sims_ray.studies.inputs import DIGITS, DIGITS_SHAPE, Inputs
from sims_ray.studies.plan import Plan

Shape = tuple[int, int, int]
FEWEST_CLASSES = 2  # enough for features that need labels


class AssumedTable(SampleTable):
    """What a sample table would say of itself, of one that is not there.

    Args:
        location: where it would lie.
        shape: (C, H, W); 1 or 3 channels are images, others latents.
        num_classes: K.
    """

    def __init__(self, location: str, shape: Shape, num_classes: int) -> None:
        kind = "image" if shape[0] in IMAGE_CHANNELS else "latent"
        facts = {"shape": list(shape), "kind": kind, "num_classes": num_classes, "unlabelled": 0}
        self.folder = Folder(location)
        self.manifest = {"fingerprint": "assumed", "result": facts}
        self.file_rows = {}


class AssumedInputs(Inputs):
    """The images and the network of a recipe whose table may be absent.

    The shape is the given one, else that of the table, of the user's base, or of the published model whose name the
    recipe has.
    """

    def __init__(
        self, recipe: Recipe, store: Store, shape: Shape | None = None, num_classes: int | None = None
    ) -> None:
        if shape is not None and recipe.data.path == DIGITS:
            raise SimsError(f"--shape is for images that are not there; the digits are, with the shape {DIGITS_SHAPE}")
        if shape is not None and num_classes is None and recipe.network.conditional:
            raise SimsError("network.conditional=true needs the number of classes; give --classes K beside --shape")
        self._given = None if shape is None else (shape, num_classes or FEWEST_CLASSES)
        super().__init__(recipe, store)

    def _own_table(self) -> SampleTable:
        if self._given is not None:
            return AssumedTable(self.table, *self._given)
        try:
            return super()._own_table()
        except SimsError:
            if (known := self._known()) is None:
                raise SimsError(
                    f"data.path={self.recipe.data.path} is no sample table yet, and the recipe does not say the shape "
                    f"of its images; give --shape C,H,W to plan without them"
                ) from None
            return AssumedTable(self.table, *known)

    def _known(self) -> tuple[Shape, int] | None:
        if self.own_base:
            network = self.own_base_card["network"]
            size = network["img_resolution"]
            return (network["img_channels"], size, size), network["label_dim"] or FEWEST_CLASSES
        preset = presets().get(self.recipe.name)
        return None if preset is None else (preset.shape, preset.num_classes)


class Outline(Plan):
    """The artifacts and jobs of a recipe, to look at; nothing is read that need not be there, and nothing written.

    Args:
        recipe: the resolved settings.
        out: output folder of the run.
        shape: (C, H, W) of images that are not there.
        num_classes: K of these.

    Raises:
        SimsError: as `Plan`; or the shape is not known.
    """

    def __init__(self, recipe: Recipe, out: Path, shape: Shape | None = None, num_classes: int | None = None) -> None:
        super().__init__(recipe, out, lambda recipe, store: AssumedInputs(recipe, store, shape, num_classes))
