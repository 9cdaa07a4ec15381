"""Summaries of runs as the report takes them: a plain one, and a full one with every optional value."""

from typing import Any

import numpy as np

METRIC = "fd_classifier@1k"
BASE = 7.4321


def trial(
    omega: float, budget_kimg: float | None, n_s: int | None, distance: float | None, **more: Any
) -> dict[str, Any]:
    where = {"omega": omega, "budget_kimg": budget_kimg, "n_s": n_s}
    return {**where, "metric": METRIC, "distance": distance, "nimg": 1000, **more}


def row(model: str, omega: float, blocks: list[float], **more: Any) -> dict[str, Any]:
    distance, alone = float(np.mean(blocks)), model.startswith("base")
    return {
        "model": model,
        "omega": omega,
        "budget_kimg": None if alone else 40.0,
        "n_s": None if alone else 4000,
        "distance": distance,
        "spread": float(np.std(blocks, ddof=1)),
        "blocks": blocks,
        "gain": 1 - distance / 7.4,
        "evaluations_per_image": 70 if model == "SIMS" else 35,
        **more,
    }


def plain_summary(**changes: Any) -> dict[str, Any]:
    """As the first version of the package wrote them."""
    cells = [(o, b, n) for n in (2000, 4000) for b in (20.0, 40.0, 80.0) for o in (-1.0, 1.0, 2.0)]
    trials = [trial(o, b, n, 4 + 3 * (o - 1) ** 2 + b / 70 + 100 / n) for o, b, n in cells]
    losses = [{"nimg": 5000 * i, "loss": 0.3 + 1 / (i * 7), "images_per_s": 2000.0} for i in range(1, 20)]
    return {
        "name": "digits",
        "metric": METRIC,
        "n_images": 1000,
        "blocks": 3,
        "num_real": 1797,
        "table": [
            row("base", 0.0, [7.3, 7.4, 7.5]),
            row("auxiliary", -1.0, [20.0, 21.0, 22.0]),
            row("SIMS", 1.0, [3.8 + 1e-13, 3.9, 4.0]),
        ],
        "selected": trials[1],
        "trials": [trial(0.0, None, None, BASE), *trials],
        "losses": {"base": losses, "auxiliary n_s=4000": losses[:8]},
        "settings": {"train": {"lr": 2e-3, "ema_rampup_ratio": None}, "name": "digits", "features": {"seed": 0}},
        "versions": {"torch": "2.13.0"},
        "seeds": {"synthesis": [0, 4000], "selection": [10**9, 10**9 + 1000]},
        "stages_s": {"train base": 75.2},
        **changes,
    }


def full_summary(**changes: Any) -> dict[str, Any]:
    """With Neon, intervals, costs, measures, curves, trials that were stopped, and matched comparisons."""
    cells = [
        (s, o, b, n) for s in ("score", "weight") for n in (2000, 4000) for b in (20.0, 40.0, 80.0) for o in STRENGTHS
    ]
    trials = [_full_trial(0.0, None, None, "score"), *(_full_trial(o, b, n, s) for s, o, b, n in cells if o != -1)]
    trials += [_full_trial(-1.0, b, n, "score") for n in (2000, 4000) for b in (20.0, 40.0, 80.0)]
    whole = [t for t in trials if not t["stopped"] and t["omega"] > 0]
    kinds = ("score", "weight")
    best = {kind: min((t for t in whole if t["space"] == kind), key=lambda t: float(t["distance"])) for kind in kinds}
    difference = {"mean": -3.5, "low": -4.1, "high": -2.9, "confidence": 0.95}
    table = [
        row("base", 0.0, [7.3, 7.4, 7.5], standard_error=0.06, minimum=7.3),
        row("base, matched evaluations", 0.0, [7.0, 7.1, 7.2], evaluations_per_image=70, num_steps=36),
        row("base, matched training", 0.0, [6.1, 6.2, 6.3], extra_kimg=40.0),
        row("auxiliary", -1.0, [20.0, 21.0, 22.0]),
        row("SIMS", 1.0, [3.8, 3.9, 4.0], standard_error=0.06, difference=difference, gain_selection=0.52, minimum=3.8),
        row("Neon", 0.5, [4.3, 4.4, 4.5], difference=difference, space="weight", measures=dict.fromkeys(MEASURES, 0.5)),
    ]
    return plain_summary(**{"trials": trials, "best": best, "selected": best["score"], "table": table, **changes})


STRENGTHS = (-1.0, 0.5, 1.0, 1.5, 2.0, 3.0)
MEASURES = ("precision", "recall", "density", "coverage", "kid")


def _full_trial(omega: float, budget_kimg: float | None, n_s: int | None, space: str) -> dict[str, Any]:
    distance = BASE + 3 * omega * (omega - 2) * (1.0 if space == "score" else 0.8) / (1 + (budget_kimg or 0) / 80)
    distance += 500 / n_s if n_s else 0
    stopped = omega == 3.0
    stops = (100, 200) if stopped else (100, 200, 500, 1000)
    curve = [{"nimg": n, "distance": distance + 400 / n} for n in stops]
    return {
        **trial(omega, budget_kimg, n_s, curve[-1]["distance"]),
        **({"space": space} if omega != 0 else {"space": "score"}),
        "nimg": stops[-1],
        "metric": METRIC if not stopped else "fd_classifier@200",
        "curve": curve,
        "stopped": stopped,
        "standard_error": 0.2,
        "nfe": 70 if space == "score" and omega not in (0, -1) else 35,
        "worker_s": 3.0 + stops[-1] / 100 + omega,
        "measures": {
            "precision": 0.7 + omega / 20,
            "recall": 0.6 - omega / 15,
            "density": 1.0,
            "coverage": 0.8,
            "kid": 1e-3,
        },
    }


def previews(*models: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {m: rng.integers(0, 256, (16, 1, 8, 8), dtype=np.uint8) for m in models or ("base", "auxiliary", "SIMS")}


def morph(n: int = 100, side: int = 8, channels: int = 1, selected: float = 1.0) -> dict[str, Any]:
    omegas = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    images = np.random.default_rng(1).integers(0, 256, (len(omegas), n, channels, side, side), dtype=np.uint8)
    return {"omegas": omegas, "images": images, "selected": selected}
