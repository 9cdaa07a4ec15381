import ast
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sims_ray.diffusion.guidance import sims_guidance
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from sims_ray.nn.schedules import ContinuousVP, DiscreteVP, RectifiedFlow, Schedule
from sims_ray.nn.wrappers import EpsilonDenoiser, NetworkDenoiser, VelocityDenoiser, X0Denoiser, diffusers_denoiser
from sims_ray.storage.torchvision import import_torchvision

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_network.py"
MEAN, VARIANCE = 0.3, 0.25
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": DiscreteVP.linear,
    "scaled-linear": DiscreteVP.scaled_linear,
    "cosine": DiscreteVP.cosine,
    "cosine-from-0": lambda: DiscreteVP.cosine(40, noiseless_start=True),
    "continuous": ContinuousVP,
    "continuous-999": lambda: ContinuousVP(time_scale=999),
    "flow": RectifiedFlow,
    "flow-1000": lambda: RectifiedFlow(time_scale=1000),
}
every_schedule = pytest.mark.parametrize("schedule", [make() for make in SCHEDULES.values()], ids=SCHEDULES)
discrete = pytest.mark.parametrize(
    "schedule", [make() for name, make in SCHEDULES.items() if name.split("-")[0] in ("linear", "scaled", "cosine")]
)


def column(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))


def gaussian(x: Tensor, sigma: Tensor, mean: float = MEAN, variance: float = VARIANCE) -> Tensor:
    """The exact denoiser of N(mean, variance)."""
    level = column(sigma, x) ** 2
    return (variance * x + level * mean) / (variance + level)


class Exact(nn.Module):
    """The optimal network of N(mean, variance), from the time it is given: predicts "n", "v" or "x0"."""

    def __init__(self, schedule: Schedule, predicts: str, mean: float = MEAN, variance: float = VARIANCE) -> None:
        super().__init__()
        self.schedule, self.predicts, self.mean, self.variance = schedule, predicts, mean, variance

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        assert x_t.dtype == time.dtype == torch.float32
        assert time.shape == x_t.shape[:1]
        sigma = column(self.schedule.sigma(time.double()), x_t)
        flow = isinstance(self.schedule, RectifiedFlow)
        a = 1 / (1 + sigma) if flow else 1 / (1 + sigma**2).sqrt()
        x = x_t.double() / a
        x0 = gaussian(x, sigma.flatten(), self.mean, self.variance)
        n = sigma * (x - self.mean) / (self.variance + sigma**2)
        v = n - x0 if flow else a * n - sigma * a * x0
        return {"n": n, "v": v, "x0": x0}[self.predicts].float()


WRAPPERS: dict[str, type[NetworkDenoiser]] = {"n": EpsilonDenoiser, "v": VelocityDenoiser, "x0": X0Denoiser}
every_wrapper = pytest.mark.parametrize(("predicts", "wrapper"), WRAPPERS.items(), ids=WRAPPERS)


def wrapped(schedule: Schedule, predicts: str, mean: float = MEAN, variance: float = VARIANCE) -> NetworkDenoiser:
    return WRAPPERS[predicts](Exact(schedule, predicts, mean, variance), schedule)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(schedule: Schedule, n: int) -> Tensor:
    """Noise levels that the schedule reaches: [n]."""
    low, high = (float(schedule.sigmas[i]) if isinstance(schedule, DiscreteVP) else (0.005, 100)[i] for i in (0, -1))
    return torch.logspace(math.log10(max(low, 0.005)), math.log10(min(high, 100)), n, dtype=torch.float64)


# --- schedules


@discrete
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_time_of_a_grid_point_is_its_exact_index(schedule: DiscreteVP, dtype: torch.dtype) -> None:
    index = torch.arange(len(schedule.sigmas))
    assert torch.equal(schedule.time(schedule.sigmas.to(dtype)), index.to(dtype))
    assert torch.equal(schedule.time(schedule.sigma(index).to(dtype)), index.to(dtype))


@every_schedule
def test_time_and_sigma_are_inverse_and_rise(schedule: Schedule) -> None:
    sigma = levels(schedule, 777)
    time = schedule.time(sigma)
    assert (time.diff() > 0).all()
    torch.testing.assert_close(schedule.sigma(time), sigma, rtol=1e-9, atol=0)
    assert torch.equal(schedule.time(sigma.reshape(7, 3, 37)), time.reshape(7, 3, 37))


@discrete
def test_between_grid_points_the_index_is_linear_in_ln_sigma_and_clamped_outside(schedule: DiscreteVP) -> None:
    low, high = schedule.sigmas[1:-1], schedule.sigmas[2:]
    third = (low.log() * 2 / 3 + high.log() / 3).exp()
    torch.testing.assert_close(schedule.time(third), torch.arange(1, len(low) + 1).double() + 1 / 3)
    outside = torch.stack([schedule.sigmas[0] * 0.9, schedule.sigmas[-1] * 1.1, torch.tensor(math.inf).double()])
    assert schedule.time(outside).tolist() == [0, len(low) + 1, len(low) + 1]


def test_a_noiseless_first_step_is_time_0_and_the_way_to_the_next_is_linear() -> None:
    schedule = DiscreteVP.cosine(40, noiseless_start=True)
    assert schedule.sigmas[0] == 0
    sigma = torch.tensor([0, 0.25, 0.5, 1], dtype=torch.float64) * schedule.sigmas[1]
    assert schedule.time(sigma).tolist() == pytest.approx([0, 0.25, 0.5, 1])
    assert float(schedule.scale(torch.zeros(()))) == 1
    x = noise(2, 1, 4, 4)
    for predicts in WRAPPERS:
        torch.testing.assert_close(wrapped(schedule, predicts)(x, torch.zeros(2)), x.float())


def test_rounding_gives_the_nearest_index_as_an_integer() -> None:
    schedule = DiscreteVP.linear(rounding=True)
    near = torch.exp(0.4 * schedule.sigmas[5].log() + 0.6 * schedule.sigmas[6].log())
    time = schedule.time(torch.stack([schedule.sigmas[5], near, schedule.sigmas[999] * 2]))
    assert time.dtype == torch.int64
    assert time.tolist() == [5, 6, 999]
    table = nn.Embedding(1000, 4)
    denoiser = EpsilonDenoiser(CallsWith(lambda x, t: x * table(t)), schedule)
    assert denoiser(noise(3, 4), torch.tensor([0.1, 1.0, 10.0])).isfinite().all()


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [(DiscreteVP.linear(), 0.0100, 157.407), (DiscreteVP.scaled_linear(), 0.0292, 14.6146)],
    ids=["ddpm", "stable-diffusion"],
)
def test_the_noise_levels_are_those_that_are_known_of_published_models(
    schedule: DiscreteVP, first: float, last: float
) -> None:
    assert float(schedule.sigmas[0]) == pytest.approx(first, abs=5e-5)
    assert float(schedule.sigmas[-1]) == pytest.approx(last, rel=5e-5)


def test_betas_are_those_that_the_chain_was_built_from() -> None:
    torch.testing.assert_close(DiscreteVP.linear(100).betas, torch.linspace(1e-4, 0.02, 100, dtype=torch.float64))
    roots = DiscreteVP.scaled_linear(100).betas.sqrt()
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(99), rtol=1e-6, atol=0)
    betas = DiscreteVP.cosine(50).betas
    assert float(betas[-1]) == pytest.approx(0.999)  # clipped
    assert (betas[:-1] < 0.999).all()


def test_the_cosine_chain_without_clipping_is_that_of_the_2d_experiment() -> None:
    schedule = DiscreteVP.cosine(40, noiseless_start=True)
    assert float(schedule.alphas_cumprod[0]) == 1
    assert float(schedule.betas[0]) == 0
    assert float(schedule.alphas_cumprod[20]) == pytest.approx(0.49384, abs=5e-6)
    assert float(schedule.alphas_cumprod[39]) == pytest.approx(0.0015172, abs=5e-8)
    assert float(schedule.betas[39]) == pytest.approx(0.7496, abs=5e-5)


def test_the_published_cosine_chain_is_the_other_one_a_step_ahead() -> None:
    published, from_0 = DiscreteVP.cosine(40), DiscreteVP.cosine(40, noiseless_start=True)
    torch.testing.assert_close(published.alphas_cumprod[:-1], from_0.alphas_cumprod[1:])


def test_the_continuous_time_solves_the_published_quadratic() -> None:
    b0, b1, sigma = 0.1, 20.0, torch.logspace(-2, 2, 50, dtype=torch.float64)
    expected = (-b0 + (b0**2 + 2 * (b1 - b0) * (1 + sigma**2).log()).sqrt()) / (b1 - b0)
    torch.testing.assert_close(ContinuousVP(b0, b1).time(sigma), expected)
    assert float(ContinuousVP(b0, b1).sigma(torch.tensor(1.0))) == pytest.approx(math.sqrt(math.exp(10.05) - 1))
    single = ContinuousVP().time(torch.tensor([1e-4]))
    assert float(single) == pytest.approx(float(ContinuousVP().time(torch.tensor([1e-4]).double())), rel=1e-6)


@pytest.mark.parametrize("num_steps", [1000, 4000])
def test_the_linear_chain_tends_to_the_continuous_one(num_steps: int) -> None:
    chain = DiscreteVP.linear(num_steps, 0.1 / num_steps, 20 / num_steps)
    time = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    ratio = chain.sigma(time * num_steps) / ContinuousVP().sigma(time)
    assert (ratio - 1).abs().max() < 40 / num_steps


@every_schedule
def test_the_velocity_is_not_parallel_to_the_state_so_that_it_determines_the_clean_data(schedule: Schedule) -> None:
    sigma = levels(schedule, 100)
    a, (da, db) = schedule.scale(sigma), schedule.velocity(sigma)
    torch.testing.assert_close(a * db - da * sigma * a, torch.ones_like(a))


@pytest.mark.parametrize(
    "bad",
    [torch.tensor([0.5, 0.9]), torch.tensor([1.1, 0.5]), torch.tensor([0.5, 0.0]), torch.ones(1), torch.ones(2, 2)],
)
def test_a_chain_that_does_not_fall_within_0_to_1_is_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        DiscreteVP(bad)


# --- wrappers


@every_schedule
@every_wrapper
@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)], ids=["points", "images"])
def test_optimal_networks_of_a_gaussian_give_its_denoiser_whatever_they_predict(
    schedule: Schedule, predicts: str, wrapper: type[NetworkDenoiser], shape: tuple[int, ...]
) -> None:
    sigma = levels(schedule, 40)
    x = MEAN + column((VARIANCE + sigma**2).sqrt(), torch.empty(40, *shape)) * noise(40, *shape)
    denoised = wrapped(schedule, predicts)(x, sigma)
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised.double(), gaussian(x, sigma), rtol=0, atol=3e-4)


@every_schedule
@every_wrapper
def test_the_sampler_reaches_the_closed_form_end_of_the_ode(
    schedule: Schedule, predicts: str, wrapper: type[NetworkDenoiser]
) -> None:
    sigma_min, sigma_max = 0.03, 14.0  # within every schedule
    latents = noise(50, 1, 2, 2)
    x = heun_sampler(wrapped(schedule, predicts), latents, sigmas=sigma_schedule(160, sigma_min, sigma_max)).images
    shrink = math.sqrt((VARIANCE + sigma_min**2) / (VARIANCE + sigma_max**2))
    before_last = MEAN + shrink * (sigma_max * latents - MEAN)
    expected = gaussian(before_last, torch.full([50], sigma_min))  # the last step denoises
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-3)


@every_wrapper
@pytest.mark.parametrize("make", [DiscreteVP.linear, RectifiedFlow])
def test_guiding_wrapped_networks_is_wrapping_the_guided_network(
    predicts: str, wrapper: type[NetworkDenoiser], make: Callable[[], Schedule]
) -> None:
    omega, schedule, x, sigma = 1.5, make(), noise(6, 1, 4, 4), torch.tensor([0.02, 0.1, 0.5, 1.0, 3.0, 9.0])
    base, aux = Exact(schedule, predicts), Exact(schedule, predicts, 0.1, 0.3)
    guided = sims_guidance(wrapper(base, schedule), wrapper(aux, schedule), omega)(x, sigma, None)
    network = CallsWith(lambda x_t, t: (1 + omega) * base(x_t, t) - omega * aux(x_t, t))
    torch.testing.assert_close(guided, wrapper(network, schedule)(x, sigma), rtol=1e-4, atol=1e-4)
    expected = (1 + omega) * gaussian(x, sigma) - omega * gaussian(x, sigma, 0.1, 0.3)
    torch.testing.assert_close(guided.double(), expected, rtol=0, atol=1e-3)


class CallsWith(nn.Module):
    """A network that is a function, and remembers what it was called with."""

    def __init__(self, function: Callable[..., Tensor] = lambda x, *_: x) -> None:
        super().__init__()
        self.function, self.inputs = function, ()

    def forward(self, *inputs: Any) -> Tensor:
        self.inputs = inputs
        return self.function(*inputs)


def test_the_network_gets_x_at_its_own_scale_with_the_data_s_part_unchanged_in_variance() -> None:
    network, sigma, x = CallsWith(), torch.tensor([0.0, 1.0, 50.0]), noise(3, 2)
    for schedule, a in ((ContinuousVP(), [1, 0.5**0.5, 1 / math.hypot(1, 50)]), (RectifiedFlow(), [1, 1 / 2, 1 / 51])):
        EpsilonDenoiser(network, schedule)(x, sigma)
        torch.testing.assert_close(network.inputs[0], x.float() * torch.tensor(a)[:, None])
        torch.testing.assert_close(network.inputs[1], schedule.time(sigma))
        assert len(network.inputs) == 2


def test_one_sigma_stands_for_a_whole_batch() -> None:
    denoiser, x = wrapped(ContinuousVP(), "n"), noise(5, 1, 4, 4)
    one = denoiser(x, torch.tensor([0.7]))
    assert torch.equal(one, denoiser(x, torch.tensor(0.7)))
    assert torch.equal(one, denoiser(x, torch.full([5], 0.7)))


def test_labels_reach_a_conditional_network_as_it_takes_them_and_no_other() -> None:
    x, sigma, labels = noise(3, 2), torch.ones(3), torch.eye(4)[[2, 0, 3]]
    labels[1] = 0  # no label

    def given(labels: Tensor | None, **options: Any) -> Any:
        network = CallsWith()
        EpsilonDenoiser(network, ContinuousVP(), **options)(x, sigma, labels)
        return network.inputs[2].tolist() if len(network.inputs) == 3 else None

    assert given(labels) is None
    assert given(labels, label_dim=4) == labels.tolist()
    assert given(None, label_dim=4) == torch.zeros(3, 4).tolist()
    assert given(labels, label_dim=4, label_kind="index") == [2, 4, 3]
    assert given(None, label_dim=4, label_kind="index") == [4, 4, 4]
    with pytest.raises(ValueError, match="label_kind is 'word'"):
        given(labels, label_dim=4, label_kind="word")


def test_a_wrapper_s_checkpoint_is_its_network_s_and_its_schedule_moves_with_it() -> None:
    denoiser = X0Denoiser(nn.Linear(2, 2), DiscreteVP.linear(), sigma_data=0.7)
    assert set(denoiser.state_dict()) == {"network.weight", "network.bias"}
    assert (denoiser.label_dim, denoiser.sigma_data) == (0, 0.7)
    assert denoiser.to("meta").schedule.sigmas.device.type == "meta"


def test_gradients_reach_the_network() -> None:
    weight = nn.Parameter(torch.ones(()))
    denoiser = VelocityDenoiser(CallsWith(lambda x, t: x * weight), DiscreteVP.linear())
    denoiser(noise(3, 2), torch.ones(3)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs() > 0


# --- diffusers


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The extra, also where a torchvision built for another torch is installed: the U-Net can do without."""
    module = pytest.importorskip("diffusers")
    try:
        import_torchvision()
    except (ImportError, RuntimeError):
        monkeypatch.setattr("diffusers.utils.import_utils._torchvision_available", False)
    return module


def unet(diffusers: ModuleType, **settings: Any) -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=settings.pop("out_channels", 1), layers_per_block=1,
        block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4, **blocks, **settings,
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_diffusers_model_denoises_as_diffusers_itself_does(
    diffusers: ModuleType, prediction_type: str, beta_schedule: str
) -> None:
    scheduler = diffusers.DDIMScheduler(beta_schedule=beta_schedule, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    network = unet(diffusers)
    denoiser = diffusers_denoiser(network, scheduler)
    for t in (0, 300, 700):
        x_t = noise(2, 1, 8, 8).float()
        a = scheduler.alphas_cumprod[t].double().sqrt()
        expected = scheduler.step(network(x_t, t).sample, t, x_t).pred_original_sample
        denoised = denoiser(x_t / a, denoiser.schedule.sigmas[t].expand(2))
        torch.testing.assert_close(denoised, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_schedules_are_those_of_diffusers(diffusers: ModuleType) -> None:
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}
    for ours, theirs in names.items():
        start, end = ends[ours]
        scheduler = diffusers.DDPMScheduler(beta_schedule=theirs, beta_start=start, beta_end=end)
        expected = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(getattr(DiscreteVP, ours)().alphas_cumprod, expected, rtol=1e-4, atol=1e-8)


def test_diffusers_classes_learned_times_and_learned_variances_are_understood(diffusers: ModuleType) -> None:
    scheduler, x, sigma = diffusers.DDPMScheduler(), noise(2, 1, 8, 8), torch.tensor([0.5, 5.0])
    with_null_class = unet(diffusers, num_class_embeds=4)
    denoiser = diffusers_denoiser(with_null_class, scheduler, label_dim=3)
    assert denoiser.label_dim == 3
    by_label = [denoiser(x, sigma, torch.eye(3)[[k, k]]) for k in range(3)] + [denoiser(x, sigma)]
    assert all((one - other).abs().max() > 0 for i, one in enumerate(by_label) for other in by_label[:i])
    assert diffusers_denoiser(with_null_class, scheduler).label_dim == 4
    learned_times = unet(diffusers, time_embedding_type="learned", num_train_timesteps=1000)
    assert diffusers_denoiser(learned_times, scheduler)(x, sigma).isfinite().all()
    assert diffusers_denoiser(unet(diffusers, out_channels=2), scheduler)(x, sigma).shape == x.shape


def test_a_diffusers_chain_that_ends_in_pure_noise_keeps_its_indices(diffusers: ModuleType) -> None:
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] == 0
    schedule = diffusers_denoiser(unet(diffusers), scheduler).schedule
    known = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod)[:-1].double().sqrt()
    torch.testing.assert_close(schedule.time(known), torch.arange(999.0, dtype=torch.float64), rtol=0, atol=0.05)
    assert schedule.time(torch.tensor([1e6])).tolist() == [999]


def test_what_diffusers_offers_beyond_is_refused_with_its_name(diffusers: ModuleType) -> None:
    scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        diffusers_denoiser(unet(diffusers), diffusers.FlowMatchEulerDiscreteScheduler())
    odd = SimpleNamespace(alphas_cumprod=scheduler.alphas_cumprod, config=SimpleNamespace(prediction_type="score"))
    with pytest.raises(ValueError, match="prediction_type is 'score'"):
        diffusers_denoiser(unet(diffusers), odd)
    with pytest.raises(ValueError, match="class_embed_type is 'timestep'"):
        diffusers_denoiser(unet(diffusers, class_embed_type="timestep"), scheduler)


def test_the_wrappers_do_without_diffusers() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import sims_ray.nn.wrappers"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- the example


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor a comment, nor a docstring."""
    source = path.read_text()
    documentation = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in documentation for i, line in lines)


def test_the_example_is_15_lines_and_samples_finite_images() -> None:
    assert code_lines(EXAMPLE) <= 15
    images = runpy.run_path(str(EXAMPLE))["images"]
    assert images.shape == (4, 3, 8, 8)
    assert images.isfinite().all()
