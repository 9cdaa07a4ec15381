"""From a recipe's network to the entry that a checkpoint card carries and `nn.networks` builds."""

from __future__ import annotations

from typing import Any

from sims_ray.config.training import NetworkSettings
from sims_ray.errors import SimsError

AUGMENT_DIM = 9  # width of the label that EDM's augmentation gives the network
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
CLASSES = {"ddpmpp": "song_unet", "ncsnpp": "song_unet", "adm": "adm_unet", "edm2": "edm2_unet"}


def network_entry(
    settings: NetworkSettings, shape: tuple[int, int, int], num_classes: int, augmented: bool
) -> dict[str, Any]:
    """Entry `network` of a checkpoint card.

    Args:
        settings: the recipe's network.
        shape: (C, R, R) of the images.
        num_classes: K, used if the network is conditional.
        augmented: whether the network is told augmentations.

    Raises:
        SimsError: a resolution with attention has channels that do not divide into heads.
    """
    if settings.architecture in ("adm", "edm2"):
        _check_heads(settings, shape[1])
    entry = settings.model_dump(mode="json", exclude={"architecture", "conditional", "precision"})
    if CLASSES[settings.architecture] == "song_unet":
        del entry["channels_per_head"]  # a single head
    if augmented:
        entry["augment_dim"] = AUGMENT_DIM
    return {
        "architecture": CLASSES[settings.architecture],
        **entry,
        **(NCSNPP if settings.architecture == "ncsnpp" else {}),
        "img_resolution": shape[1],
        "img_channels": shape[0],
        "label_dim": num_classes if settings.conditional else 0,
    }


def _check_heads(settings: NetworkSettings, img_resolution: int) -> None:
    """Attention would be left out of a resolution that is narrower than a head, without a word."""
    for level, mult in enumerate(settings.channel_mult):
        res, width = img_resolution >> level, settings.model_channels * mult
        attends = res in settings.attn_resolutions or level == len(settings.channel_mult) - 1
        heads = width // settings.channels_per_head
        if attends and (not heads or width % heads):
            raise SimsError(
                f"network: the {width} channels at {res}x{res} do not divide into attention heads of about "
                f"channels_per_head={settings.channels_per_head}; change one of them"
            )
