"""Settings of the sweep."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sims_ray.config.base import Count, Omega, Seed, Settings
from sims_ray.config.sampling import GuidanceSettings

GRID, OPTUNA = "grid", "optuna"
SERIES = (1, 2, 5)
FEWEST_PART = 10  # the first distance of a trial is taken at a tenth of its images at least


class TuneSettings(Settings):
    """The search over guidance strength, budget (finetune.budgets_kimg) and synthetic-set size."""

    omega: tuple[Omega, ...] = Field(
        min_length=1, description="guidance strengths of SIMS; 0 is the base, -1 the auxiliary"
    )
    w: tuple[Omega, ...] = Field((), description="strengths of Neon, in weight space; none: Neon is left out")
    n_s: tuple[Count, ...] = Field(min_length=1, description="synthetic-set sizes; prefixes of the largest")
    intervals: tuple[GuidanceSettings, ...] = Field(
        (), description="guidance intervals to search; none: that of guidance alone"
    )
    num_steps: tuple[Count, ...] = Field((), description="numbers of solver steps to search; none: sampler.num_steps")
    n_images: Annotated[int, Field(ge=2)] = Field(10_000, description="images per trial, on the selection seeds")
    fidelities: tuple[Annotated[int, Field(ge=2)], ...] | None = Field(
        None, description="numbers of images at which a trial's distance is taken; null: 1, 2, 5, 10, ... thousand"
    )
    search: str = Field(
        GRID,
        description="'grid': every cell; 'optuna': a surrogate of the distance chooses the cells; or a search "
        "algorithm of Ray Tune by its name there",
    )
    num_trials: Count | None = Field(None, description="cells that a search tries at most; null: a third of them")
    measures: tuple[Literal["kid", "manifold", "fd_inf", "fd_error"], ...] = Field(
        ("manifold", "fd_error"), description="beside the distance, of trials that are measured in full"
    )
    unimodal: bool = Field(
        True, description="a search leaves out strengths beyond the two that enclose the best known one"
    )
    stop_early: bool = Field(False, description="ASHA ends trials that are behind the others at the same images")
    reduction_factor: Annotated[float, Field(gt=1)] = Field(2.0, description="ASHA goes on with one trial in so many")
    seed: Seed = Field(0, description="of the search")

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        for name in ("omega", "w"):
            values = getattr(self, name)
            if values and not any(value > 0 for value in values):
                raise ValueError(f"{name}={list(values)} needs a value above 0, or there is nothing to choose")
        for name in ("omega", "w", "n_s", "num_steps", "intervals"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must not repeat a value")
        given = self.fidelities or ()
        if list(given) != sorted(set(given)) or (given and given[-1] > self.n_images):
            raise ValueError(
                f"fidelities={list(given)} must increase and end at n_images={self.n_images} at the latest"
            )
        return self

    @property
    def stops(self) -> tuple[int, ...]:
        """The numbers of images at which a trial's distance is taken, all of them last."""
        if self.fidelities is not None:
            return tuple(sorted({*self.fidelities, self.n_images}))
        series = (digit * 10**power for power in range(len(str(self.n_images))) for digit in SERIES)
        least = max(2, self.n_images // FEWEST_PART)
        return (*(n for n in series if least <= n < self.n_images), self.n_images)
