"""Post-hoc EMA: a weight average of any length from stored averages of two lengths (EDM2, arXiv 2312.02696)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.nn.ema import posthoc_weights
from sims_ray.nn.networks import describe_network, trainable_parameters
from sims_ray.storage.checkpoints import load_tensors, read_card
from sims_ray.storage.training_states import save_patiently

PATTERN = "average-*.safetensors"


def average_path(folder: Path, nimg: int, std: float) -> Path:
    """Path of a stored average of relative width `std` at `nimg` images seen."""
    return folder / f"average-{nimg:012d}-{std:.3f}.safetensors"


def save_average(folder: Path, nimg: int, std: float, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Store one average in float16, as EDM2's releases do; buffers and what does not train keep their precision."""
    fixed = _fixed(card)
    halved = {name: t if name in fixed else t.to(torch.float16) for name, t in tensors.items()}
    save_patiently(
        average_path(folder, nimg, std), halved, {**card, "role": "average", "nimg": nimg, "ema": power_ema(std)}
    )


def power_ema(std: float) -> dict[str, Any]:
    """Entry `ema` of a card for a power-function average."""
    return {"kind": "power", "std": std}


def reconstruct(paths: Sequence[Path], std: float, nimg: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The average of relative width `std` that ends at `nimg`, as the closest combination of stored ones.

    Args:
        paths: stored averages of one run, of any two or more lengths or ends.
        std: relative width to reconstruct.
        nimg: where it ends, in images seen, at a stored average; None for the last one.

    Returns:
        Tensors (float32; what does not train as in the last average) and card.

    Raises:
        SimsError: no averages, files that are none, of different networks, or an end or a width that does not exist.
    """
    cards = {path: read_card(path) for path in paths}
    if not cards:
        raise SimsError("no stored averages to reconstruct from; give the files average-*.safetensors of a run")
    for path, card in cards.items():
        if card.get("ema", {}).get("kind") != "power" or not card.get("nimg"):
            raise SimsError(f"{path} is not a power-function average; its card must give ema.std and nimg")
    ends = sorted({card["nimg"] for card in cards.values()})
    end = ends[-1] if nimg is None else nimg
    if end not in ends:
        near = sorted(ends, key=lambda stored: abs(stored - end))[:2]
        raise SimsError(
            f"no stored average ends at {end:,} images; the nearest end at {' and '.join(f'{n:,}' for n in near)}"
        )
    # In one order whatever order they are given in, as sums round.
    used = sorted(
        (path for path in cards if cards[path]["nimg"] <= end),
        key=lambda path: (cards[path]["nimg"], cards[path]["ema"]["std"]),
    )
    last = cards[used[-1]]
    for path in used:
        if cards[path]["network"] != last["network"]:
            raise SimsError(f"{path} and {used[-1]} hold different networks; give the averages of one run")
    try:
        weights = posthoc_weights([cards[p]["nimg"] for p in used], [cards[p]["ema"]["std"] for p in used], end, std)
    except ValueError as error:
        raise SimsError(f"{used[-1].parent}: {error}") from None
    return _combined(used, weights.tolist(), last), {**last, "ema": power_ema(std)}


def _combined(paths: Sequence[Path], weights: Sequence[float], card: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weighted sum over the files, one in memory at a time."""
    fixed = _fixed(card)
    total: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, tensor in load_tensors(path)[0].items():
            if name in fixed:
                total[name] = tensor
            elif name in total:
                total[name].add_(tensor.to(torch.float32), alpha=weight)
            else:
                total[name] = tensor.to(torch.float32) * weight
    return total


def _fixed(card: Mapping[str, Any]) -> set[str]:
    """Names of what is the same in all averages of a run: buffers, and parameters that do not train."""
    net = describe_network(card["network"])
    resolution = card.get("optimization", {}).get("trainable_resolution", 0)
    return net.state_dict().keys() - trainable_parameters(net, card.get("trainable", "all"), resolution)
