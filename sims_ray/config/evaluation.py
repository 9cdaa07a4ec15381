"""Settings of what distances are measured in, and on how many images."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sims_ray.config.base import Count, Positive, Seed, Settings

FEWEST_TO_EXTRAPOLATE = 30


class FeatureSettings(Settings):
    """What distances are measured in."""

    kind: Literal["classifier", "checkpoint", "inception", "dinov2", "pixels"] = Field(
        "classifier",
        description="'classifier': trained on the real images' labels; 'checkpoint': a classifier's file; "
        "'inception': clean-fid's; 'dinov2': Meta's; 'pixels': raw pixels",
    )
    weights: str | None = Field(
        None, description="file or URI of the weights of a checkpoint, inception or dinov2; null: fetch the last two"
    )
    statistics: str | None = Field(
        None, description="file of EDM's or clean-fid's reference statistics; null: those of the real images"
    )
    feature_dim: Annotated[int, Field(ge=2)] = 64
    width: Count = 32
    steps: Count = 600
    batch_size: Count = 128
    lr: Positive = 1e-3
    seed: Seed = 0
    reference_nimg: Count = Field(
        10_000, description="real images whose features are kept, for what moments do not say: KID, precision, recall"
    )

    @model_validator(mode="after")
    def _weights_where_they_belong(self) -> Self:
        if self.kind == "checkpoint" and self.weights is None:
            raise ValueError("kind=checkpoint needs weights; set features.weights to a classifier's .safetensors file")
        if self.kind in ("classifier", "pixels") and self.weights is not None:
            raise ValueError(f"kind={self.kind} takes no weights; leave features.weights out, or set kind=checkpoint")
        if self.kind == "classifier" and self.statistics is not None:
            raise ValueError(
                "kind=classifier trains its features here, so no statistics=FILE can be in them; set another kind"
            )
        return self


class EvaluateSettings(Settings):
    """The reported distance."""

    n_images: Annotated[int, Field(ge=2)] = Field(50_000, description="images per report block")
    blocks: Count = Field(3, description="disjoint seed blocks; the spread over them is reported")
    part_nimg: Count = Field(1_000, description="images per unit of work")
    measures: tuple[Literal["kid", "manifold", "fd_inf"], ...] = Field(
        ("kid", "manifold", "fd_inf"),
        description="beside the distance; manifold: precision, recall, density and coverage; fd_inf: at infinite n",
    )
    matched: bool = Field(
        True, description="compare with the base at as many network evaluations, and trained on for as many images"
    )

    @model_validator(mode="after")
    def _enough_images(self) -> Self:
        if "fd_inf" in self.measures and self.n_images < FEWEST_TO_EXTRAPOLATE:
            raise ValueError(
                f"n_images={self.n_images} are too few for fd_inf, which takes {FEWEST_TO_EXTRAPOLATE}; raise it, or "
                f"leave fd_inf out of evaluate.measures"
            )
        return self
