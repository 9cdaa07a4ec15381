"""What images are sampled from: a base checkpoint, optionally steered away from an auxiliary one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sims_ray.diffusion.guidance import sims_guidance
from sims_ray.diffusion.sampler import Denoiser
from sims_ray.errors import SimsError
from sims_ray.nn.precond import Precond
from sims_ray.storage.checkpoints import load_model

CACHED_MODELS = 4


@dataclass(frozen=True)
class SimsModel:
    """A base checkpoint, an auxiliary one and the guidance strength between them.

    Attributes:
        base: checkpoint of the base.
        aux: checkpoint of the auxiliary; None for the base alone.
        omega: guidance strength; 0 is the base, -1 the auxiliary.
    """

    base: str
    aux: str | None = None
    omega: float = 0.0

    @classmethod
    def of(cls, base: Path, aux: Path | None = None, omega: float = 0.0) -> SimsModel:
        """The model as workers on any node find it: with absolute paths."""
        return cls(str(base.resolve()), str(aux.resolve()) if aux else None, omega)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for travel between processes."""
        return asdict(self)

    def load(self, device: str = "cpu") -> tuple[Denoiser, Mapping[str, Any]]:
        """The guided denoiser on `device`, and the base's card.

        Raises:
            SimsError: a file is no checkpoint, the auxiliary is missing, or the two networks differ.
        """
        base, card = _load(self.base, device)
        if self.omega == 0:
            return base, card
        if self.aux is None:
            raise SimsError(f"omega={self.omega:g} needs an auxiliary checkpoint; give one, or set omega=0")
        aux, aux_card = _load(self.aux, device)
        if aux_card["network"] != card["network"]:
            raise SimsError(
                f"{self.aux} and {self.base} hold different networks; fine-tune the auxiliary from this base"
            )
        return sims_guidance(base, aux, self.omega), card


@lru_cache(maxsize=CACHED_MODELS)
def _load(path: str, device: str) -> tuple[Precond, Mapping[str, Any]]:
    return load_model(Path(path), device)
