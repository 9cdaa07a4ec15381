"""What a run starts from: the real images, and the network they are fitted with or a base that is there already."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from sims_ray.config import Recipe
from sims_ray.config.architecture import network_entry
from sims_ray.data.samples import IMAGE_CHANNELS
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import Store
from sims_ray.storage.checkpoints import described, read_card
from sims_ray.storage.folders import absolute
from sims_ray.storage.latents import card_latents

DIGITS = "digits"
DIGITS_SHAPE, DIGITS_CLASSES = (1, 8, 8), 10


class Inputs:
    """The real images and the network of one recipe.

    Args:
        recipe: the resolved settings.
        store: where the embedded digits are imported to.

    Attributes:
        digits: the artifact of the embedded digits, if the recipe uses them.
        table: folder of the sample table, or its URI.
        shape: (C, H, W) of the images.
        kind: 'image' or 'latent'.
        num_classes: K.
        data_fingerprint: of the sample table.

    Raises:
        SimsError: the images do not fit the network, there is no sample table at data.path, or no base at
            train.checkpoint.
    """

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.recipe = recipe
        self.digits = store.artifact("import", {"source": DIGITS}) if recipe.data.path == DIGITS else None
        self.table = absolute(self.digits.path if self.digits else recipe.data.path)
        self.shape: tuple[int, int, int] = DIGITS_SHAPE
        self.num_classes = DIGITS_CLASSES
        self.kind = "image"
        self.data_fingerprint = self.digits.fingerprint if self.digits else ""
        self._unlabelled = 0
        if self.digits is None:
            table = self._own_table()
            self.shape, self.num_classes, self._unlabelled = table.shape, table.num_classes, table.unlabelled
            self.data_fingerprint, self.kind = table.fingerprint, table.kind
            self._table_latents = table.manifest["result"].get("latents")
        self._check_images()

    def _own_table(self) -> SampleTable:
        try:
            return SampleTable(self.table)
        except SimsError as error:
            raise SimsError(
                f"data.path={self.recipe.data.path} is not a sample table ({error}); "
                f"make one with `sims data import IMAGES OUT` and give OUT"
            ) from None

    def _check_images(self) -> None:
        self._check_shape()
        needs = {
            "network.conditional=true": self.recipe.network.conditional and not self.own_base,
            "features.kind=classifier": self.recipe.features.kind == "classifier",
        }
        for setting, needed in needs.items():
            if needed and (self.num_classes < 2 or self._unlabelled):
                found = f"{self._unlabelled} images without a label" if self._unlabelled else "one class only"
                raise SimsError(
                    f"{self.recipe.data.path} has {found}, but {setting} needs labels; import labelled images, "
                    f"or set network.conditional=false and features.kind=pixels"
                )

    def _check_shape(self) -> None:
        if self.own_base:
            self._check_own_base()
        channels, height, width = self.shape
        if self.kind == "image" and channels not in IMAGE_CHANNELS:
            raise SimsError(
                f"{self.recipe.data.path} has {channels} channels, but images are grey or RGB; import images or latents"
            )
        network = self.recipe.network
        halvings = len(network.channel_mult) - 1
        if not self.own_base and (height != width or height % 2**halvings):
            raise SimsError(
                f"{self.recipe.data.path} holds {height}x{width} images, but the {halvings + 1} levels of "
                f"network.channel_mult need squares that divide by {2**halvings}; "
                f"import with --size, or give fewer levels"
            )
        if (lowest := self.recipe.finetune.trainable_resolution) > height:
            raise SimsError(
                f"finetune.trainable_resolution={lowest} is above the {height} pixels of the images, so that nothing "
                f"would train; lower it"
            )

    def _check_own_base(self) -> None:
        network, where = self.own_base_card["network"], self.recipe.train.checkpoint
        made_for = (network["img_channels"], network["img_resolution"], network["img_resolution"])
        if made_for != self.shape:
            raise SimsError(
                f"train.checkpoint={where} makes images of {made_for}, but {self.recipe.data.path} holds {self.shape}; "
                f"import the images in the size and channels of the base"
            )
        if network["label_dim"] and network["label_dim"] < self.num_classes:
            raise SimsError(
                f"train.checkpoint={where} knows {network['label_dim']} classes, but {self.recipe.data.path} has "
                f"{self.num_classes}; give the images the base's own classes"
            )
        if self.recipe.finetune.augment and not network.get("augment_dim"):
            raise SimsError(
                f"train.checkpoint={where} is not told augmentations, but finetune.augment="
                f"{self.recipe.finetune.augment:g}; set it to 0"
            )

    @property
    def own_base(self) -> bool:
        """Whether the user brings a base."""
        return self.recipe.train.checkpoint is not None

    @cached_property
    def network(self) -> dict[str, Any]:
        """Entry `network` of every checkpoint card of this run."""
        if self.own_base:
            return dict(self.own_base_card["network"])
        augmented = bool(self.recipe.train.augment or self.recipe.finetune.augment)
        return network_entry(self.recipe.network, self.shape, self.num_classes, augmented)

    @property
    def latents(self) -> dict[str, Any]:
        """How latents relate to pixels, as the base's card or else the table says it; empty for images."""
        if self.kind == "image":
            return {}
        found = card_latents(self.own_base_card) if self.own_base else self._table_latents
        return {"latents": found} if found else {}

    @cached_property
    def own_base_card(self) -> dict[str, Any]:
        """Card of the base that the user brings.

        Raises:
            SimsError: the file is no denoiser.
        """
        path = Path(str(self.recipe.train.checkpoint))
        card = read_card(path)
        described(path, card)
        return card

    @property
    def precision(self) -> str:
        """Dtype of the network on a GPU."""
        return str(self.own_base_card.get("precision", "float32")) if self.own_base else self.recipe.network.precision
