"""The policy of a training as it works out: what learning rate, weight average and so on amount to at each budget.

A ramp of the learning rate that is longer than the budget never ends, and the rate of the settings is never reached:
the published fine-tuning of EDM was done at 15 to 60 % of it (Neon, arXiv 2510.03597, by the code beside it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from sims_ray.config import FinetuneSettings
from sims_ray.nn.dropout import ImageDropout
from sims_ray.nn.networks import describe_network, num_parameters, trainable_parameters
from sims_ray.stages.train_job import KIMG, TrainJob, budget_name

STARTS = {
    "fresh": "fresh weights",
    "ema": "the base's EMA weights",
    "weights": "the weights that the base's training ended with",
}


def effective(job: TrainJob, nimg: int) -> dict[str, Any]:
    """What the policy amounts to at `nimg` images seen, as plain values."""
    s, optimization = job.settings, job.optimization()
    tuned = s if isinstance(s, FinetuneSettings) else None
    known = _of_network(json.dumps(dict(job.network)), job.trainable, optimization.trainable_resolution)
    return {
        "start": tuned.start if tuned else "fresh",
        "reset_optimizer": tuned.reset_optimizer if tuned else True,
        "batch_size": s.batch_size,
        "steps": nimg // s.batch_size,
        "lr": optimization.learning_rate(nimg),
        **_average(job, nimg),
        "augment": s.augment,
        "trainable": job.trainable,
        **known,
        "dropout": known["dropout"] if tuned is None or tuned.dropout is None else tuned.dropout,
    }


def policy_params(job: TrainJob) -> dict[str, dict[str, Any]]:
    """What the policy amounts to at each budget, by the budget's name."""
    return {f"{budget_name(b)}kimg": effective(job, job.snapshot_nimg(b)) for b in job.budgets_kimg}


def policy_lines(job: TrainJob) -> list[str]:
    """The policy in words, with what it amounts to at each budget."""
    found = [(budget, effective(job, job.snapshot_nimg(budget))) for budget in job.budgets_kimg]
    known = found[0][1]

    def at_each(text: Callable[[dict[str, Any]], str]) -> str:
        return ", ".join(f"{text(values)} at B={_number(budget)} kimg" for budget, values in found)

    overridden = isinstance(job.settings, FinetuneSettings) and job.settings.dropout is not None
    return [
        f"start: {STARTS[known['start']]}; Adam "
        f"{'starts anew' if known['reset_optimizer'] else 'goes on with the moments of the base'}",
        _lr_line(job, at_each),
        _average_line(job, at_each),
        f"dropout {known['dropout']:g} ({'set for the auxiliary' if overridden else 'as in the network'}), "
        f"label dropout {known['label_dropout']:g}, augmentation {known['augment']:g}",
        _parameters_line(job, known),
        f"batch {known['batch_size']:,}: " + at_each(lambda values: f"{values['steps']:,} steps"),
    ]


@lru_cache(maxsize=8)
def _of_network(network: str, trainable: str, resolution: int) -> Mapping[str, Any]:
    """What the policy takes from the network, given as JSON; to build one takes its time."""
    net = describe_network(json.loads(network))
    trained = trainable_parameters(net, trainable, resolution)
    dropouts = [module.probability for module in net.modules() if isinstance(module, ImageDropout)]
    return {
        "dropout": max(dropouts, default=0.0),
        "label_dropout": float(getattr(net.network, "label_dropout", 0.0)),
        "trainable_parameters": sum(p.numel() for name, p in net.named_parameters() if name in trained),
        "parameters": num_parameters(net),
    }


def _average(job: TrainJob, nimg: int) -> dict[str, Any]:
    s = job.settings
    if s.ema_stds:
        return {"ema_std": s.ema_std, "ema_width_kimg": s.ema_std * nimg / KIMG}
    ratio, halflife = s.ema_rampup_ratio, s.ema_halflife_kimg
    return {"ema_halflife_kimg": halflife if ratio is None else min(halflife, ratio * nimg / KIMG)}


def _lr_line(job: TrainJob, at_each: Callable[[Callable[[dict[str, Any]], str]], str]) -> str:
    s = job.settings
    if not s.lr_rampup_kimg and not s.lr_decay_kimg:
        return f"lr {s.lr:g} from the first step on"
    ramp = f" after a ramp over {_number(s.lr_rampup_kimg)} kimg" if s.lr_rampup_kimg else ""
    decay = f", falling as 1/sqrt(images) from {_number(s.lr_decay_kimg)} kimg on" if s.lr_decay_kimg else ""
    ends = "" if job.stop_nimg >= s.lr_rampup_kimg * KIMG else "; the ramp does not end"
    reached = at_each(lambda values: f"{values['lr']:.3g} ({100 * values['lr'] / s.lr:.3g} % of it)")
    return f"lr {s.lr:g}{ramp}{decay}: {reached}{ends}"


def _average_line(job: TrainJob, at_each: Callable[[Callable[[dict[str, Any]], str]], str]) -> str:
    s = job.settings
    if s.ema_stds:
        widths = at_each(lambda values: f"{_number(values['ema_width_kimg'])} kimg wide")
        return f"EMA of relative width {s.ema_std:g}: {widths}"
    if s.ema_rampup_ratio is None:
        return f"EMA half-life {_number(s.ema_halflife_kimg)} kimg from the first step on"
    halflives = at_each(lambda values: f"{_number(values['ema_halflife_kimg'])} kimg")
    return (
        f"EMA half-life {_number(s.ema_halflife_kimg)} kimg, at most {s.ema_rampup_ratio:g} of the images: {halflives}"
    )


def _parameters_line(job: TrainJob, known: dict[str, Any]) -> str:
    some, whole = (f"{known[name] / 1e6:.3g} M" for name in ("trainable_parameters", "parameters"))
    if job.trainable == "all":
        return f"all {whole} parameters train"
    resolution = job.optimization().trainable_resolution
    return f"{some} of {whole} parameters train: the decoder{f' from {resolution} pixels up' if resolution else ''}"


def _number(value: float) -> str:
    return f"{value:,.6g}" if value < 1000 else f"{value:,.12g}"
