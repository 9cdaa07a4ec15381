"""What images are sampled from: a base checkpoint, optionally steered away from an auxiliary one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from sims_ray.diffusion.evaluations import Denoiser
from sims_ray.diffusion.guidance import guidance_interval, shared_encoder_guidance, sims_guidance
from sims_ray.errors import SimsError
from sims_ray.nn.merge import merge
from sims_ray.nn.precond import Precond
from sims_ray.storage.checkpoints import load_model

CACHED_MODELS = 4
AUTO = "auto"
Space = Literal["score", "weight"]
SCORE: Space = "score"
WEIGHT: Space = "weight"


@dataclass(frozen=True)
class SimsModel:
    """A base checkpoint, an auxiliary one and the extrapolation from the auxiliary through the base.

    In score space this is SIMS, two networks; in weight space Neon, one network that is merged from the two. An
    auxiliary whose card says that its decoder alone was fine-tuned shares the base's encoder.

    Attributes:
        base: checkpoint of the base.
        aux: checkpoint of the auxiliary; None for the base alone.
        omega: guidance strength, in weight space Neon's w; 0 is the base, -1 the auxiliary.
        sigma_lo, sigma_hi: guidance acts at noise levels in (sigma_lo, sigma_hi]; None for no upper limit.
        space: "score" or "weight".
    """

    base: str
    aux: str | None = None
    omega: float = 0.0
    sigma_lo: float = 0.0
    sigma_hi: float | None = None
    space: Space = SCORE

    @classmethod
    def of(
        cls,
        base: Path,
        aux: Path | None = None,
        omega: float = 0.0,
        sigma_lo: float = 0.0,
        sigma_hi: float | None = None,
        space: Space = SCORE,
    ) -> SimsModel:
        """The model as workers on any node find it: with absolute paths."""
        sigma_hi = None if sigma_hi == math.inf else sigma_hi
        return cls(str(base.resolve()), str(aux.resolve()) if aux else None, omega, sigma_lo, sigma_hi, space)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for travel between processes."""
        return asdict(self)

    def load(
        self, device: str = "cpu", precision: str = AUTO, compiled: bool = False
    ) -> tuple[Denoiser, Mapping[str, Any]]:
        """The guided denoiser on `device`, and the base's card.

        Args:
            device: where to put the networks.
            precision: dtype they run in; 'auto' for what the card says on a GPU, float32 elsewhere.
            compiled: compile the networks on first use.

        Raises:
            SimsError: a file is no checkpoint, the auxiliary is missing, the networks differ, the interval is empty.
        """
        base, card = _load(self.base, device, precision, compiled)
        if self.omega == 0:
            return base, card
        if self.aux is None:
            raise SimsError(f"omega={self.omega:g} needs an auxiliary checkpoint; give one, or set omega=0")
        aux, aux_card = _load(self.aux, device, precision, compiled)
        if aux_card["network"] != card["network"]:
            raise SimsError(
                f"{self.aux} and {self.base} hold different networks; fine-tune the auxiliary from this base"
            )
        if self.omega == -1:
            return aux, card
        shared = aux_card.get("trainable") == "decoder"
        sigma_hi = math.inf if self.sigma_hi is None else self.sigma_hi
        try:
            guided: Denoiser
            if self.space == WEIGHT:
                guided = _merged(self.base, self.aux, self.omega, device, precision, compiled)
            else:
                guided = (shared_encoder_guidance if shared else sims_guidance)(base, aux, self.omega)
            return guidance_interval(guided, base, self.sigma_lo, sigma_hi), card
        except ValueError as error:
            raise SimsError(f"{self.aux} and {self.base}: {error}") from None


@lru_cache(maxsize=CACHED_MODELS)
def _load(path: str, device: str, precision: str, compiled: bool) -> tuple[Precond, Mapping[str, Any]]:
    net, card = load_model(Path(path), device)
    return _ready(net, card, device, precision, compiled), card


def _ready(net: Precond, card: Mapping[str, Any], device: str, precision: str, compiled: bool) -> Precond:
    if precision == AUTO:
        precision = card.get("precision", "float32") if torch.device(device).type == "cuda" else "float32"
    net.run_in(precision)
    if compiled:
        net.compile_network()
    return net


@lru_cache(maxsize=CACHED_MODELS)
def _merged(base: str, aux: str, w: float, device: str, precision: str, compiled: bool) -> Precond:
    """Neon's network; merged in float32, whatever it then runs in."""
    base_net, card = load_model(Path(base), device)
    aux_net, _ = load_model(Path(aux), device)
    return _ready(merge(base_net, aux_net, w), card, device, precision, compiled)
