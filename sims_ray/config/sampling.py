"""Settings of sampling: the solver, and where guidance acts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sims_ray.config.base import Count, NonNegative, Positive, Settings


class SamplerSettings(Settings):
    """How images are drawn from a model."""

    solver: Literal["heun", "euler", "ddim", "ddpm"] = Field("heun", description="heun and euler know S_churn")
    state_dtype: Literal["float64", "float32"] = Field("float64", description="of the image between steps")
    num_steps: Count = 18
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0
    S_churn: NonNegative = 0.0
    S_min: NonNegative = 0.0
    S_max: NonNegative = 1e9
    S_noise: Positive = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min:g} must be below sigma_max={self.sigma_max:g}")
        if self.S_min > self.S_max:
            raise ValueError(f"S_min={self.S_min:g} must not exceed S_max={self.S_max:g}")
        if self.S_churn and self.solver not in ("heun", "euler"):
            raise ValueError(f"S_churn={self.S_churn:g} means nothing to solver={self.solver}; set it to 0")
        return self


class GuidanceSettings(Settings):
    """Where SIMS guidance acts; its strength is searched."""

    sigma_lo: NonNegative = Field(0.0, description="no guidance at noise levels up to this one")
    sigma_hi: Positive | None = Field(None, description="no guidance at noise levels above this one; null: no limit")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.sigma_hi is not None and self.sigma_lo >= self.sigma_hi:
            raise ValueError(f"sigma_lo={self.sigma_lo:g} must be below sigma_hi={self.sigma_hi:g}")
        return self
