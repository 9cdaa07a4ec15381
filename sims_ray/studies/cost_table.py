"""An estimate on the terminal: the stages, the memory, where the numbers are from, what does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from sims_ray.nn.flops import FLOPS_PER_MAC
from sims_ray.studies.console import align
from sims_ray.studies.cost import Work, storage_bytes
from sims_ray.studies.estimate import Estimate
from sims_ray.studies.throughput import Fact

DURATIONS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
NOTE = (
    "NFE: network evaluations per image, of training forward passes. FLOP: multiplications and additions; MAC: pairs\n"
    "of both, which papers call FLOPs. Not included: starting Ray, features and distances, reading and writing,\n"
    "the exchange of gradients between workers, work that does not divide evenly among them."
)


def cost_table(estimate: Estimate) -> str:
    """Everything that an estimate says."""
    parts = [_heading(estimate), align(list(_rows(estimate))), *_one_distance(estimate), NOTE]
    parts += ["", align([("memory of a worker in training", ""), *_memory(estimate)])]
    facts = [("number", "value", "from"), *((f.name, f.value, f.source) for f in _facts(estimate))]
    parts += ["", align(facts), *(f"warning: {sentence}" for sentence in estimate.warnings())]
    return "\n".join(parts)


def duration(seconds: float) -> str:
    """Seconds in the largest unit that makes them more than one."""
    size, unit = next(((size, unit) for size, unit in DURATIONS if seconds >= size), (1.0, "s"))
    return f"{seconds / size:.3g} {unit}"


def byte_count(nbytes: float) -> str:
    """Bytes in the largest unit that makes them more than one."""
    size, unit = next(((size, unit) for size, unit in SIZES if nbytes >= size), (1.0, "B"))
    return f"{nbytes / size:.3g} {unit}"


def _heading(estimate: Estimate) -> str:
    plan, speed = estimate.plan, estimate.throughput
    channels, height, width = plan.inputs.shape
    lines = [
        f"{plan.recipe.name}: {estimate.workload.parameters / 1e6:.1f}M parameters, {channels}x{height}x{width} "
        f"{plan.inputs.kind}s; {estimate.workers} x {speed.device}, {estimate.precision}"
    ]
    if plan.base_job is None:
        lines.append(f"base: {plan.recipe.train.checkpoint}, nothing to train")
    return "\n".join(lines)


def _rows(estimate: Estimate) -> Iterator[tuple[str, ...]]:
    hours = "GPU-hours" if estimate.throughput.on_gpu else "worker-hours"
    yield "stage", "", "images", "NFE", "evaluations", "MAC", "FLOP", "time", hours, "storage"
    for work in estimate.stages:
        yield (
            work.stage,
            work.detail,
            f"{work.images:,}",
            f"{work.evaluations_per_image:.4g}",
            *_amounts(work.evaluations, work.flops),
            duration(estimate.elapsed_s(work)),
            f"{estimate.device_hours(work):.3g}",
            byte_count(work.left_bytes),
        )
    stages = estimate.stages
    left_bytes, most_bytes = storage_bytes(stages)
    yield (
        "total",
        "",
        "",
        "",
        *_amounts(sum(work.evaluations for work in stages), sum(work.flops for work in stages)),
        duration(sum(map(estimate.elapsed_s, stages))),
        f"{sum(map(estimate.device_hours, stages)):.3g}",
        f"{byte_count(left_bytes)}, {byte_count(most_bytes)} at most",
    )


def _amounts(evaluations: float, flops: float) -> tuple[str, str, str]:
    return f"{evaluations:.3g}", f"{flops / FLOPS_PER_MAC:.3g}", f"{flops:.3g}"


def _one_distance(estimate: Estimate) -> Iterator[str]:
    """What one distance takes, as papers count it."""
    blocks, nimg = estimate.plan.recipe.evaluate.blocks, estimate.plan.recipe.evaluate.n_images
    of: dict[str, Work] = {work.detail.partition(",")[0]: work for work in estimate.stages if work.stage == "report"}
    base, sims = (of[kind].flops / blocks / FLOPS_PER_MAC for kind in ("base", "SIMS"))
    yield f"One distance on {nimg:,} images takes {base:.2g} MAC of the base and {sims:.2g} of SIMS."


def _memory(estimate: Estimate) -> Iterator[tuple[str, str]]:
    memory, nimg = estimate.memory, estimate.pass_nimg
    yield from ((name, byte_count(nbytes)) for name, nbytes in memory.parts.items() if nbytes)
    kept = f"{nimg} of {estimate.share_nimg} images per pass, {byte_count(memory.image_bytes)} each"
    yield kept, byte_count(nimg * memory.image_bytes)
    yield "total", f"{byte_count(memory.total_bytes(nimg))} of {byte_count(estimate.throughput.memory_bytes)}"


def _facts(estimate: Estimate) -> Iterator[Fact]:
    flops = estimate.workload.flops
    macs = flops.forward / FLOPS_PER_MAC
    counted = "counted from the network's shapes with torch's FlopCounterMode"
    yield Fact("network evaluation, one image", f"{macs / 1e9:.4g} GMAC, {flops.forward / 1e9:.4g} GFLOP", counted)
    yield Fact("training, one image", "3 evaluations", "a backward pass has two products for one of the forward pass")
    if estimate.plan.recipe.finetune.trainable == "decoder":
        factor = f"{flops.training('decoder') / flops.forward:.3g} evaluations"
        yield Fact("fine-tuning, one image", factor, "the encoder has no backward pass")
    yield from estimate.throughput.facts
    yield Fact("memory", "as above", "shapes, and what autograd keeps of a pass; kernels' workspaces are not counted")
    yield Fact("storage", "as above", "float32 weights, uncompressed images, moments of the features")
