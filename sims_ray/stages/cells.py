"""Cells: the models that a sweep compares, and the lattice that they lie on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

from sims_ray.stages.evaluate import Evaluation
from sims_ray.storage.models import SCORE, WEIGHT, Space

BASE_NAME = "base"
SYMBOLS = {SCORE: "omega", WEIGHT: "w"}


@dataclass(frozen=True)
class Cell:
    """One model of the search space, and how many steps it is sampled in.

    Attributes:
        omega: guidance strength, in weight space Neon's w; 0 is the base, -1 the auxiliary.
        budget_kimg: fine-tuning budget B; None for the base.
        n_s: synthetic-set size; None for the base.
        space: "score" for SIMS, "weight" for Neon.
        sigma_lo, sigma_hi: guidance acts at noise levels in (sigma_lo, sigma_hi]; None for no upper limit.
        num_steps: solver steps; None for the recipe's.
        extra_kimg: images of real data that the base is trained on for longer; None for the base as it is.
    """

    omega: float = 0.0
    budget_kimg: float | None = None
    n_s: int | None = None
    space: Space = SCORE
    sigma_lo: float = 0.0
    sigma_hi: float | None = None
    num_steps: int | None = None
    extra_kimg: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Cell:
        """The cell in values that hold more than that, like a trial's result."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    @property
    def guided(self) -> bool:
        """Whether it is neither the base nor the auxiliary."""
        return self.omega not in (0, -1)

    @property
    def params(self) -> dict[str, Any]:
        """The coordinates by name; strength, B and n_s always, the others where they are not the usual ones."""
        usual = Cell()
        rest = {k: v for k, v in asdict(self).items() if v != getattr(usual, k)}
        return {"omega": self.omega, "budget_kimg": self.budget_kimg, "n_s": self.n_s, **rest}

    @property
    def name(self) -> str:
        """The coordinates, for people."""
        words = [BASE_NAME]
        if self.budget_kimg is not None:
            words = [f"{SYMBOLS[self.space]}={self.omega:g}", f"B={self.budget_kimg:g}kimg", f"n_s={self.n_s}"]
        if self.sigma_lo or self.sigma_hi is not None:
            words.append(f"sigma={self.sigma_lo:g}..{math.inf if self.sigma_hi is None else self.sigma_hi:g}")
        if self.num_steps is not None:
            words.append(f"steps={self.num_steps}")
        if self.extra_kimg is not None:
            words.append(f"+{self.extra_kimg:g}kimg real")
        return " ".join(words)


@dataclass(frozen=True)
class Trial:
    """One cell to measure on the selection seeds.

    Attributes:
        cell: the model.
        evaluation: its distance, at the fidelities on the way.
    """

    cell: Cell
    evaluation: Evaluation

    @property
    def name(self) -> str:
        """The coordinates, for people."""
        return self.cell.name


@dataclass(frozen=True)
class Lattice:
    """The points of a search: every combination of one value per axis, the guidance strength last.

    Attributes:
        axes: the values along each axis, in the order in which they are alike.
        make: the cell at some values.
    """

    axes: Mapping[str, Sequence[Any]]
    make: Callable[..., Cell]

    @cached_property
    def points(self) -> dict[tuple[int, ...], Cell]:
        """The cell at each point; a point is an index per axis. The base lies at several of them."""
        indices = product(*(range(len(values)) for values in self.axes.values()))
        return {point: self.make(**self.values(point)) for point in indices}

    def values(self, point: tuple[int, ...]) -> dict[str, Any]:
        """The values at a point, by axis."""
        return {name: values[i] for (name, values), i in zip(self.axes.items(), point, strict=True)}

    @cached_property
    def cells(self) -> list[Cell]:
        """Each cell once, in the order of the points."""
        return list(dict.fromkeys(self.points.values()))
