"""What a plan says a run will cost: against the papers, against a run, and against itself at another scale."""

from functools import cache
from pathlib import Path

import pytest
import torch

from sims_ray.config import load_recipe, presets
from sims_ray.diffusion.augment import AUGMENT_DIM
from sims_ray.diffusion.evaluations import Evaluations, count_evaluations
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.guidance import guidance_interval, shared_encoder_guidance, sims_guidance
from sims_ray.diffusion.loss import DenoisingLoss
from sims_ray.errors import SimsError
from sims_ray.nn.flops import FLOPS_PER_MAC, gpu_named
from sims_ray.nn.networks import build_network, decoder_parameters
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.storage.models import SimsModel
from sims_ray.studies import estimate as estimate_module
from sims_ray.studies import measurement
from sims_ray.studies.cost import Work, Workload, storage_bytes
from sims_ray.studies.cost_table import byte_count, cost_table, duration
from sims_ray.studies.estimate import Estimate, estimate
from sims_ray.studies.footprint import footprint
from sims_ray.studies.outline import Outline
from sims_ray.studies.passes import passes
from sims_ray.studies.plan import Plan
from sims_ray.studies.sims import SimsRun
from sims_ray.studies.throughput import published_cost, share_of_peak
from tests.conftest import TinyRecipe
from tests.networks import SETTINGS, small_network

GPU = ("compute.gpus_per_worker=1",)
NOWHERE = Path("no-such-folder")


@cache
def on(gpu: str, recipe: str, *overrides: str) -> Estimate:
    return estimate(Outline(load_recipe(recipe, [*GPU, *overrides]), NOWHERE), gpu_named(gpu))


def stages(estimated: Estimate) -> dict[str, Work]:
    """The stages by name, of training and reports each with its detail."""
    return {f"{work.stage} {work.detail.partition(',')[0]}".strip(): work for work in estimated.stages}


def macs(work: Work) -> float:
    return work.flops / FLOPS_PER_MAC


def test_cifar10_costs_what_the_papers_settings_amount_to() -> None:
    of, mac = stages(on("v100", "edm-cifar10-vp")), 21.3e9
    assert macs(of["train base"]) == pytest.approx(3 * mac * 200e6, rel=0.01)  # 1.28e19
    assert macs(of["finetune n_s=100000"]) == pytest.approx(3 * mac * 40e6, rel=0.01)  # 2.6e18
    assert macs(of["synthesize"]) == pytest.approx(mac * 35 * 100_000, rel=0.01)  # 7.5e16
    assert of["synthesize"].evaluations == 35 * 100_000
    assert macs(of["report base"]) / 3 == pytest.approx(mac * 35 * 50_000, rel=0.01)  # 3.7e16 for one distance
    assert macs(of["report SIMS"]) / 3 == pytest.approx(mac * 70 * 50_000, rel=0.01)  # 7.5e16


def test_imagenet512_costs_what_the_papers_settings_amount_to() -> None:
    of, mac = stages(on("h100", "edm2-img512-s")), 102e9
    assert macs(of["train base"]) == pytest.approx(3 * mac * 2**31, rel=0.02)  # 6.6e20
    assert macs(of["finetune n_s=1500000"]) == pytest.approx(3 * mac * 102e6, rel=0.02)  # 3.1e19
    assert macs(of["synthesize"]) == pytest.approx(mac * 63 * 1.5e6, rel=0.02)  # 9.6e18


@pytest.mark.parametrize(
    ("name", "gpu", "workers", "gpu_hours"),
    [("edm-cifar10-vp", "v100", 8, 384), ("edm-ffhq64-vp", "v100", 8, 768), ("edm-imagenet64-adm", "a100", 32, 9984)],
)
def test_what_was_published_takes_as_long_as_published(name: str, gpu: str, workers: int, gpu_hours: float) -> None:
    estimated = on(gpu, name, f"compute.num_workers={workers}")
    base = stages(estimated)["train base"]
    assert estimated.device_hours(base) == pytest.approx(gpu_hours, rel=1e-3)
    assert estimated.elapsed_s(base) == pytest.approx(gpu_hours * 3600 / workers, rel=1e-3)
    said = cost_table(estimated)
    assert f"{gpu_hours:g} GPU-hours" in said and "EDM (arXiv 2206.00364)" in said and "NVIDIA" in said


def test_of_other_models_the_published_training_in_the_same_kind_of_precision_counts() -> None:
    assert published_cost("digits", "float32").preset == "edm-cifar10-vp"
    assert published_cost("edm2-img512-s", "bfloat16").preset == "edm-imagenet64-adm"
    assert 0.1 < share_of_peak(published_cost("edm-imagenet64-adm", "float16")) < 0.2
    assert 1.0 < share_of_peak(published_cost("edm-cifar10-vp", "float32")) < 1.3  # Winograd, and days are rounded


SAMPLERS = {
    "heun": {"solver": "heun", "num_steps": 6},
    "euler": {"solver": "euler", "num_steps": 6},
    "ddpm": {"solver": "ddpm", "num_steps": 6},
    "churned": {"solver": "heun", "num_steps": 6, "S_churn": 4.0, "S_max": 50.0},
}


def counted(sampler: dict[str, object], omega: float, decoder_only: bool, lo: float, hi: float) -> Evaluations:
    """What a real model counts on a real image."""
    base, aux = small_network(0), small_network(0)
    for name, parameter in aux.named_parameters():
        if not decoder_only or name in decoder_parameters(aux):
            parameter += 0.01
    guided = (shared_encoder_guidance if decoder_only else sims_guidance)(base, aux, omega)
    with count_evaluations() as tally:
        list(generate(guidance_interval(guided, base, lo, hi), (1, 8, 8), range(3), sampler))
    return tally


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("decoder_only", [False, True])
@pytest.mark.parametrize(("lo", "hi"), [(0.0, float("inf")), (0.2, 5.0)])
def test_evaluations_are_planned_as_a_sampler_counts_them(
    name: str, decoder_only: bool, lo: float, hi: float, tiny: TinyRecipe
) -> None:
    schedule = tiny().sampler.model_dump(mode="json")
    sampler = {**schedule, **SAMPLERS[name]}
    model = SimsModel("", "", 1.0, lo, None if hi == float("inf") else hi)
    assert passes(sampler, model, decoder_only) == counted(sampler, 1.0, decoder_only, lo, hi)


def test_guidance_doubles_the_evaluations_but_at_omega_0_and_minus_1(tiny: TinyRecipe) -> None:
    sampler = tiny().sampler.model_dump(mode="json")  # 4 Heun steps
    nfe = {omega: passes(sampler, SimsModel("", "", omega)).nfe for omega in (-1.0, 0.0, 0.5, 2.0)}
    assert nfe == {-1.0: 7, 0.0: 7, 0.5: 14, 2.0: 14}
    assert passes(sampler, SimsModel("", "", 1.0), decoder_only=True).nfe == 10.5
    of = stages(on("h100", "digits", "tune.omega=[-1,0,1,2]", "tune.n_s=[6000]"))
    assert (of["tune base"].images, of["tune auxiliary"].images, of["tune SIMS"].images) == (500, 1000, 2000)
    assert of["tune base"].evaluations_per_image == of["tune auxiliary"].evaluations_per_image == 35
    assert of["tune SIMS"].evaluations_per_image == of["report SIMS"].evaluations_per_image == 70
    assert of["tune SIMS"].flops == 8 * of["tune base"].flops


def test_an_auxiliary_with_a_shared_encoder_costs_what_its_halves_cost() -> None:
    plain, shared = (
        stages(on("h100", "edm-cifar10-vp", f"finetune.trainable={which}")) for which in ("all", "decoder")
    )
    ratio = shared["report SIMS"].flops / shared["report base"].flops
    assert 1.6 < ratio < 1.75 and plain["report SIMS"].flops == 2 * plain["report base"].flops
    assert shared["report SIMS"].evaluations_per_image == 1.5 * 35
    name = "finetune n_s=100000"
    assert 0.75 < shared[name].flops / plain[name].flops < 0.8
    assert shared["train base"].flops == plain["train base"].flops


@pytest.mark.parametrize(
    ("overrides", "grown"),
    [
        (("train.duration_kimg=200",), {"train base"}),
        (("finetune.budgets_kimg=[40,80]",), {"finetune n_s=2000", "finetune n_s=6000", "train longer base"}),
        (("tune.n_s=[4000,12000]",), {"synthesize"}),
        (("tune.n_images=1000",), {"tune base", "tune SIMS", "tune Neon"}),
        (("evaluate.n_images=2000",), {"report base", "report auxiliary", "report SIMS", "report Neon"}),
        (("seeds.preview_nimg=128",), {"preview"}),
    ],
)
def test_cost_is_proportional_to_images(overrides: tuple[str, ...], grown: set[str]) -> None:
    batch = "train.batch_size=200", "finetune.batch_size=200"  # which divides all of these
    before, after = (on("h100", "digits", *batch, *some) for some in ((), overrides))
    names = [name for name in stages(before) if not name.startswith("finetune") or "tune.n_s" not in overrides[0]]
    for name in names:
        old, new = stages(before)[name], stages(after)[name]
        factor = 2 if name in grown else 1
        assert (new.images, new.evaluations) == (factor * old.images, factor * old.evaluations)
        assert after.elapsed_s(new) == pytest.approx(factor * before.elapsed_s(old))
        assert after.device_hours(new) == pytest.approx(factor * before.device_hours(old))


def test_more_workers_take_less_time_and_as_many_gpu_hours() -> None:
    one, four = (on("h100", "digits", f"compute.num_workers={n}") for n in (1, 4))
    for work in one.stages:
        assert four.elapsed_s(work) == pytest.approx(one.elapsed_s(work) / 4)
        assert four.device_hours(work) == pytest.approx(one.device_hours(work))
    half = on("h100", "digits", "compute.num_workers=1", "compute.gpus_per_worker=0.5")
    assert half.elapsed_s(half.stages[0]) == pytest.approx(2 * one.elapsed_s(one.stages[0]))
    assert half.device_hours(half.stages[0]) == pytest.approx(one.device_hours(one.stages[0]))


@pytest.mark.slow
def test_a_run_does_what_was_planned_and_leaves_about_as_many_bytes(tiny: TinyRecipe, out: Path) -> None:
    recipe = tiny("network.model_channels=32", "train.duration_kimg=1")  # weights that outweigh cards and headers
    planned = Workload(Outline(recipe, out)).stages()
    assert not out.exists()
    run = SimsRun(recipe, out)
    run.report()
    best = run.tune()["best"]
    sets = [run.plan.synthesis_job, *run.plan.preview_jobs(best).values(), *run.plan.morph_jobs(best).values()]
    evaluations = [trial.evaluation for trial in run.plan.sweep.trials]
    reports = [e for blocks in run.plan.report_evaluations(best).values() for e in blocks]
    jobs = [job for job in (run.plan.base_job, run.plan.finetune_job(96)) if job is not None]
    made = {
        "train": [(job.stop_nimg, 1.0) for job in jobs[:1]],
        "finetune": [(job.stop_nimg, 1.0) for job in jobs[1:]],
        "synthesize": [(96, 7.0)],
        "preview": [
            (9, 7.0),
            (9, 15.0),
            (9, 7.0),
            (9, 7.0),
            *[(9, 14.0)] * 9,
        ],  # SIMS at 9 strengths
        "tune": [(e.artifact.result["nimg"], e.artifact.result["nfe"]) for e in evaluations],
        "report": [(e.artifact.result["nimg"], e.artifact.result["nfe"]) for e in reports],
    }
    assert [len(job.artifact.manifest["files"]) > 0 for job in jobs] == [True, True]
    assert sum(len(job.set.survey().kept) for job in sets) > 0
    for stage, parts in made.items():
        works = [work for work in planned if work.stage == stage]
        assert sum(work.images for work in works) == sum(nimg for nimg, _ in parts)
        assert sum(work.evaluations for work in works) == sum(nimg * nfe for nimg, nfe in parts)
    for work, job in zip([w for w in planned if w.training and w.stage != "train longer"], jobs, strict=True):
        left = sum(path.stat().st_size for path in job.artifact.path.glob("*.safetensors"))
        assert left == pytest.approx(work.left_bytes, rel=0.1)


def test_a_base_that_the_user_brings_costs_no_training(tmp_path: Path, out: Path, tiny: TinyRecipe) -> None:
    base = tmp_path / "mine.safetensors"
    save_tensors(base, small_network().state_dict(), {"role": "base", "network": SETTINGS, "nimg": 5})
    own, trained = (tiny(*GPU, *some) for some in ((f"train.checkpoint={base}",), ()))
    with_it, without = (estimate(Outline(recipe, out), gpu_named("a100")) for recipe in (own, trained))
    assert list(stages(without)) == ["train base", *stages(with_it)]
    assert len(with_it.stages) == len(without.stages) - 1
    assert "nothing to train" in cost_table(with_it) and "nothing to train" not in cost_table(without)


def test_an_outline_is_the_plan_of_the_run(tiny: TinyRecipe, out: Path) -> None:
    recipe = tiny()
    outline, plan = Outline(recipe, out), Plan(recipe, out)
    assert vars(outline).keys() == vars(plan).keys()
    assert outline.base_job == plan.base_job and outline.finetune_job(96) == plan.finetune_job(96)
    assert outline.sweep.trials == plan.sweep.trials


def test_images_that_are_not_there_need_a_shape_unless_the_model_is_a_published_one(out: Path) -> None:
    with pytest.raises(SimsError, match=r"data.path=data/photos is no sample table yet.*--shape C,H,W"):
        Outline(load_recipe("images32"), out)
    assert Outline(load_recipe("images32"), out, (3, 16, 16)).inputs.network["img_resolution"] == 16
    assert Outline(load_recipe("edm-ffhq64-vp"), out).inputs.shape == (3, 64, 64)
    conditional = load_recipe("images32", ["network.conditional=true"])
    with pytest.raises(SimsError, match="--classes"):
        Outline(conditional, out, (3, 32, 32))
    assert Outline(conditional, out, (3, 32, 32), 7).inputs.network["label_dim"] == 7
    with pytest.raises(SimsError, match="the digits are"):
        Outline(load_recipe("digits"), out, (3, 32, 32))


@pytest.mark.parametrize("name", [n for n, preset in presets().items() if preset.published["sims_fid"]])
def test_the_four_models_that_sims_improved_are_planned_without_data(name: str) -> None:
    said = cost_table(on("h100", name))
    assert "train" in said and "report" in said and name in said
    assert not NOWHERE.exists()


def kept_for_real(network: dict[str, object], nimg: int) -> int:
    """Bytes that autograd keeps of a real pass, beside the weights."""
    net = build_network(network).train()
    own = {t.untyped_storage().data_ptr() for t in net.state_dict(keep_vars=True).values()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.randn(nimg, 1, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = DenoisingLoss(net)(images, torch.ones(nimg), images, None, torch.zeros(nimg, AUGMENT_DIM))
    assert loss.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_memory_grows_with_images_as_autograd_keeps_their_activations(tiny: TinyRecipe, out: Path) -> None:
    plan = Outline(tiny("network.attn_resolutions=[8,4]", "train.augment=0.1"), out)
    assert plan.base_job is not None
    memory = footprint(plan.inputs.network, plan.base_job.optimization(), "float32", 1)
    real = kept_for_real(plan.inputs.network, 6) - kept_for_real(plan.inputs.network, 2)
    assert memory.image_bytes == pytest.approx(real / 4, rel=0.1)
    assert memory.total_bytes(10) - memory.total_bytes(4) == pytest.approx(6 * memory.image_bytes)
    assert memory.most_images(memory.total_bytes(10)) == 10


def test_memory_counts_weights_gradients_adam_and_every_average(tiny: TinyRecipe, out: Path) -> None:
    plan = Outline(tiny(), out)
    assert plan.base_job is not None
    settings = plan.base_job.optimization()
    one, two = (footprint(plan.inputs.network, settings, "float32", workers) for workers in (1, 2))
    weights = Workload(plan).parameters * 4
    assert one.parts["Adam"] == 2 * weights and one.parts["gradients"] == weights
    assert one.parts["weights"] == pytest.approx(weights, rel=0.01)  # and a few buffers
    assert two.fixed_bytes == one.fixed_bytes + weights
    halves = footprint(plan.inputs.network, settings, "float16", 1)
    assert halves.image_bytes < 0.7 * one.image_bytes
    assert 0.3 * weights < halves.parts["copies of weights"] <= 0.5 * weights  # not those that no gradient needs


def test_what_does_not_fit_is_said_with_numbers_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = on("h100", "edm-cifar10-vp")
    assert list(fits.warnings()) == [] and fits.pass_nimg == fits.share_nimg == 64
    small = on("rtx4090", "edm2-img512-xxl", "compute.num_workers=8")
    assert small.most_nimg < 1
    assert any(w.startswith("training does not fit: one image per pass takes") for w in small.warnings())
    forced = on("v100", "edm-cifar10-vp", "compute.num_workers=1", "compute.training_micro_batch=512")
    (warning,) = forced.warnings()
    assert f"set compute.training_micro_batch to {forced.most_nimg} or less" in warning and "512 images" in warning
    less = on("v100", "edm-cifar10-vp", "compute.num_workers=1", f"compute.training_micro_batch={forced.most_nimg}")
    assert list(less.warnings()) == []
    chosen = on("v100", "edm-cifar10-vp", "compute.num_workers=1")  # the worker finds what fits
    assert list(chosen.warnings()) == [] and chosen.pass_nimg <= chosen.most_nimg < 2 * chosen.pass_nimg
    free = estimate_module.shutil.disk_usage(".")
    monkeypatch.setattr(estimate_module.shutil, "disk_usage", lambda folder: free._replace(free=10**9))
    (warning,) = on("h100", "edm-cifar10-vp").warnings()
    assert warning.startswith("the run does not fit on the disk") and "1.0 GB free" in warning


def test_storage_is_what_stays_and_the_most_that_lies_beside_it() -> None:
    works = [
        Work("train", "", 1, 1, 1, True, 10, 8),
        Work("tune", "", 1, 1, 1, False, 3, 5),
        Work("report", "a", 1, 1, 1, False, 2, 6),
        Work("report", "b", 1, 1, 1, False, 2, 4),
    ]
    assert storage_bytes(works) == (17, 27)
    assert storage_bytes(works[:2]) == (13, 21)


def test_this_machine_is_measured_with_a_workers_threads(
    tiny: TinyRecipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "MEASURED_S", 0.05)
    before = torch.get_num_threads()
    recipe = tiny("compute.num_workers=1", "compute.cpus_per_worker=1", "train.batch_size=64")
    estimated = estimate(Outline(recipe, out))
    assert torch.get_num_threads() == before
    assert not out.exists()
    assert all(estimated.elapsed_s(work) > 0 for work in estimated.stages)
    facts = {fact.name: fact for fact in estimated.throughput.facts}
    assert "times 64 images in" in facts["training, one worker"].source
    assert "threads: 1" in facts["training, one worker"].source
    assert "times 96 images in" in facts["network evaluations, one worker"].source
    assert "worker-hours" in cost_table(estimated)


def test_steps_that_would_take_long_are_measured_with_fewer_images(
    tiny: TinyRecipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "MEASURED_S", 0.0)
    monkeypatch.setattr(measurement, "LONGEST_S", 1e-9)
    estimated = estimate(Outline(tiny(), out))
    assert "times 1 images in place of 64" in estimated.throughput.facts[0].source


def test_a_network_that_this_machine_cannot_train_is_not_tried(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_memory_bytes", lambda device, compute: 1e9)
    with pytest.raises(SimsError, match="nothing can be measured; name a GPU with --gpu"):
        estimate(Outline(load_recipe("edm-cifar10-vp"), out))


def test_a_gpu_that_lacks_the_dtype_is_refused() -> None:
    with pytest.raises(SimsError, match="a v100 does not compute in bfloat16"):
        on("v100", "edm-cifar10-vp", "compute.precision=bfloat16")


def test_units_are_the_largest_that_make_more_than_one() -> None:
    assert [duration(s) for s in (0.5, 59, 90, 5400, 2 * 86400)] == ["0.5 s", "59 s", "1.5 min", "1.5 h", "2 d"]
    assert [byte_count(n) for n in (12, 2e3, 3.5e6, 1e9, 4e12)] == ["12 B", "2 kB", "3.5 MB", "1 GB", "4 TB"]


def test_previews_of_training_are_sampled_as_often_as_the_training_passes_one() -> None:
    of = stages(on("h100", "digits", "train.preview_kimg=30", "finetune.preview_kimg=50"))
    shown = of["train previews of base: 3"]
    assert (shown.images, shown.evaluations_per_image, shown.training) == (3 * 64, 35, False)
    assert not any("previews of n_s" in name for name in of)  # 40 kimg see none
