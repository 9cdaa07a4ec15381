"""Which class each synthetic image is conditioned on."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sims_ray.config.base import SEED_LIMIT, Count, Settings

SUM_TOLERANCE = 1e-6


class LabelSettings(Settings):
    """The classes of a synthetic set; whether the network knows them is checked where the network is known."""

    kind: Literal["seed", "uniform", "probabilities", "quotas"] = Field(
        "seed",
        description="'seed': drawn from the image's own stream as EDM does; 'uniform': every class equally often; "
        "'probabilities': drawn with labels.probabilities; 'quotas': exactly as often as labels.quotas says",
    )
    probabilities: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="one per class, of sum 1; for kind=probabilities"
    )
    quotas: dict[Annotated[int, Field(ge=0)], Count] | None = Field(
        None, description="images of each label in every run of as many images as they add up to; for kind=quotas"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("probabilities", "quotas"):
            value = getattr(self, name)
            if name == self.kind and not value:
                raise ValueError(f"kind={self.kind} needs {name}; give labels.{name}")
            if name != self.kind and value is not None:
                raise ValueError(f"{name} means nothing to kind={self.kind}; set kind={name} or leave {name} out")
        if sum((self.quotas or {}).values()) > SEED_LIMIT:
            raise ValueError(f"quotas add up to more images than there are seeds, {SEED_LIMIT}; give smaller counts")
        total = math.fsum(self.probabilities or (1.0,))
        if abs(total - 1) > SUM_TOLERANCE:
            raise ValueError(f"probabilities add up to {total:.9g}; make them add up to 1")
        return self
