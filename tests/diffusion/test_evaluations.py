import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser, Evaluations, count_evaluations, evaluate, record
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.guidance import (
    autoguidance,
    classifier_free_guidance,
    guidance_interval,
    shared_encoder_guidance,
    sims_guidance,
)
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import SAMPLERS, sigma_schedule
from sims_ray.nn.merge import merge
from sims_ray.nn.networks import decoder_parameters
from sims_ray.nn.precond import Precond
from tests.networks import small_network

STEPS = (1, 2, 5, 18)


class Counted:
    """A function as denoiser that counts its own calls, apart from the package's count."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        self.calls += 1
        return 0.5 * x


def nfe(denoiser: Denoiser, num_steps: int, solver: str = "heun", batch_size: int = 2) -> float:
    """The cost that the sampler reports."""
    streams = SeedStreams(range(batch_size))
    latents = streams.randn([1, 8, 8], torch.float32)
    return SAMPLERS[solver](denoiser, latents, sigmas=sigma_schedule(num_steps), streams=streams).nfe


def heun(num_steps: int) -> int:
    """Evaluations of Heun's method in theory: two a step but for the last."""
    return 2 * num_steps - 1


def evaluations_within(num_steps: int, sigma_lo: float, sigma_hi: float) -> int:
    """Those of the steps that start inside an interval."""
    pairs = itertools.pairwise(sigma_schedule(num_steps).tolist())
    return sum(1 + (t_next > 0) for t_cur, t_next in pairs if sigma_lo < t_cur <= sigma_hi)


def decoder_tuned(base: Precond) -> Precond:
    """A copy whose decoder alone has moved."""
    aux = copy.deepcopy(base)
    for name in decoder_parameters(base):
        aux.get_parameter(name).add_(0.1)
    return aux


# --- samplers


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize(
    ("solver", "theory"),
    [("heun", heun), ("euler", lambda n: n), ("ddim", lambda n: n), ("ddpm", lambda n: n)],
    ids=["heun: 2n - 1", "euler: n", "ddim: n", "ddpm: n"],
)
def test_n_steps_cost_what_the_solver_costs(num_steps: int, solver: str, theory: Callable[[int], int]) -> None:
    denoiser = Counted()
    assert nfe(denoiser, num_steps, solver) == theory(num_steps) == denoiser.calls
    assert nfe(small_network(), num_steps, solver) == theory(num_steps)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_cost_per_image_does_not_depend_on_the_batch(batch_size: int) -> None:
    assert nfe(sims_guidance(Counted(), Counted(), 1.0), 5, batch_size=batch_size) == 18


# --- guidance


@pytest.mark.parametrize("num_steps", STEPS)
def test_sims_and_autoguidance_and_classifier_free_guidance_cost_twice_the_solver(num_steps: int) -> None:
    main, other = Counted(), Counted()
    for guided in (
        sims_guidance(main, other, 1.5),
        autoguidance(main, other, 2.0),
        classifier_free_guidance(main, 3.0),
        classifier_free_guidance(main, 3.0, other),
    ):
        main.calls = other.calls = 0
        assert nfe(guided, num_steps) == 2 * heun(num_steps) == main.calls + other.calls


@pytest.mark.parametrize("num_steps", STEPS)
def test_no_guidance_costs_the_solver(num_steps: int) -> None:
    main, other = Counted(), Counted()
    for unguided in (
        sims_guidance(main, other, 0.0),
        sims_guidance(main, other, -1.0),
        autoguidance(main, other, 1.0),
        classifier_free_guidance(main, 1.0),
    ):
        assert nfe(unguided, num_steps) == heun(num_steps)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize(("sigma_lo", "sigma_hi"), [(0.0, 80.0), (0.19, 1.61), (5.0, 1000.0), (0.002, 0.0021)])
def test_guidance_in_an_interval_costs_one_more_in_each_evaluation_of_a_step_inside(
    num_steps: int, sigma_lo: float, sigma_hi: float
) -> None:
    base, aux = Counted(), Counted()
    guided = guidance_interval(sims_guidance(base, aux, 1.0), base, sigma_lo, sigma_hi)
    within = evaluations_within(num_steps, sigma_lo, sigma_hi)
    assert nfe(guided, num_steps) == heun(num_steps) + within
    assert (base.calls, aux.calls) == (heun(num_steps), within)


def test_the_interval_of_edm2_xxl_costs_6_of_32_steps() -> None:
    """Steps 17 to 22 of 32, the interval (0.19, 1.61] that arXiv 2404.07724 found best."""
    base, aux = Counted(), Counted()
    assert nfe(guidance_interval(autoguidance(base, aux, 2.0), base, 0.19, 1.61), 32) == 63 + 12


@pytest.mark.parametrize("num_steps", STEPS)
def test_a_shared_encoder_costs_one_and_a_half_times_the_solver(num_steps: int) -> None:
    base = small_network()
    aux = decoder_tuned(base)
    assert nfe(shared_encoder_guidance(base, aux, 1.0), num_steps) == 1.5 * heun(num_steps)


@pytest.mark.parametrize("num_steps", STEPS)
def test_a_merged_network_costs_the_solver(num_steps: int) -> None:
    assert nfe(merge(small_network(0), small_network(1), 1.0), num_steps) == heun(num_steps)


def combinations() -> dict[str, tuple[Callable[[], Denoiser], float]]:
    """Guidance of guided denoisers, and the evaluations of each in one call."""

    def sims() -> Denoiser:
        return sims_guidance(Counted(), Counted(), 1.0)

    def shared() -> Denoiser:
        base = small_network()
        return shared_encoder_guidance(base, decoder_tuned(base), 1.0)

    return {
        "SIMS of autoguided": (lambda: sims_guidance(autoguidance(Counted(), Counted(), 2.0), Counted(), 1.0), 3),
        "autoguidance by SIMS": (lambda: autoguidance(Counted(), sims(), 2.0), 3),
        "classifier-free of SIMS": (lambda: classifier_free_guidance(sims(), 2.0), 4),
        "SIMS of two SIMS": (lambda: sims_guidance(sims(), sims(), 1.0), 4),
        "autoguided shared encoder": (lambda: autoguidance(shared(), Counted(), 2.0), 2.5),
        "classifier-free of shared encoder": (lambda: classifier_free_guidance(shared(), 2.0), 3),
        "SIMS of two shared encoders": (lambda: sims_guidance(shared(), shared(), 1.0), 3),
    }


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("name", combinations())
def test_combined_guidance_costs_the_sum_of_its_networks(name: str, num_steps: int) -> None:
    build, per_call = combinations()[name]
    assert nfe(build(), num_steps) == per_call * heun(num_steps)


@pytest.mark.parametrize("name", combinations())
def test_combined_guidance_in_an_interval_costs_its_networks_inside_and_one_outside(name: str) -> None:
    build, per_call = combinations()[name]
    within = evaluations_within(18, 0.19, 1.61)
    guided = guidance_interval(build(), Counted(), 0.19, 1.61)
    assert nfe(guided, 18) == per_call * within + heun(18) - within
    assert 0 < within < heun(18)


# --- the count itself


def images() -> tuple[Tensor, Tensor, None]:
    return torch.zeros(2, 1, 8, 8), torch.ones(2), None


def test_a_plain_function_counts_one_and_one_that_evaluates_others_counts_only_them() -> None:
    function = Counted()

    def twice(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        return evaluate(function, evaluate(function, x, sigma, labels), sigma, labels)

    with count_evaluations() as tally:
        evaluate(function, *images())
        assert tally.nfe == 1
        evaluate(twice, *images())
        assert tally.nfe == 3 == function.calls


def test_half_a_network_counts_one_half() -> None:
    tally = Evaluations()
    tally.record(encoders=1, decoders=2)
    assert tally.nfe == 1.5
    tally.record()
    assert tally.nfe == 2.5


def test_nothing_is_counted_outside_the_block() -> None:
    evaluate(Counted(), *images())
    record(5, 5)
    with count_evaluations() as tally:
        assert tally.nfe == 0
        evaluate(Counted(), *images())
    evaluate(Counted(), *images())
    record(5, 5)
    assert tally.nfe == 1


def test_a_call_past_evaluate_is_not_counted() -> None:
    with count_evaluations() as tally:
        Counted()(*images())
    assert tally.nfe == 0


def test_blocks_add_up_and_each_counts_what_is_inside() -> None:
    with count_evaluations() as outer:
        evaluate(Counted(), *images())
        with count_evaluations() as inner:
            evaluate(Counted(), *images())
            evaluate(Counted(), *images())
        evaluate(Counted(), *images())
        record(encoders=1, decoders=0)
    assert (outer.nfe, inner.nfe) == (4.5, 2)


def test_a_block_that_fails_hands_the_count_back() -> None:
    def broken(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        raise RuntimeError("broken")

    with count_evaluations() as outer:
        with pytest.raises(RuntimeError, match="broken"), count_evaluations():
            evaluate(broken, *images())
        evaluate(Counted(), *images())
    assert outer.nfe == 1


def run(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_that_take_turns_count_their_own_evaluations_alone() -> None:
    turns, counts = threading.Barrier(2, timeout=60), dict[str, float]()
    denoisers = {"plain": Counted(), "guided": sims_guidance(Counted(), Counted(), 1.0)}

    def work(name: str) -> None:
        with count_evaluations() as tally:
            for _ in range(3):
                turns.wait()
                evaluate(denoisers[name], *images())
            counts[name] = tally.nfe

    with count_evaluations() as outer:
        run(*[threading.Thread(target=work, args=[name]) for name in denoisers])
    assert counts == {"plain": 3, "guided": 6}
    assert outer.nfe == 0


def test_the_evaluations_of_another_thread_are_not_counted() -> None:
    denoiser = Counted()
    with count_evaluations() as tally:
        run(threading.Thread(target=evaluate, args=[denoiser, *images()]))
    assert (denoiser.calls, tally.nfe) == (1, 0)


# --- generate


@pytest.mark.parametrize("solver", sorted(SAMPLERS))
def test_generated_batches_report_the_cost_of_each_image(solver: str) -> None:
    settings: dict[str, Any] = {"num_steps": 3, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "solver": solver}
    guided = sims_guidance(Counted(), Counted(), 1.0)
    batches = list(generate(guided, (1, 4, 4), range(5), settings, batch_size=2))
    assert [len(batch.seeds) for batch in batches] == [2, 2, 1]
    assert [batch.nfe for batch in batches] == [10 if solver == "heun" else 6] * 3


def test_batches_of_two_models_taken_in_turns_report_their_own_cost() -> None:
    settings: dict[str, Any] = {"num_steps": 3, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    models = (Counted(), sims_guidance(Counted(), Counted(), 1.0))
    plain, guided = (generate(model, (1, 4, 4), range(4), settings, batch_size=2) for model in models)
    assert [(next(plain).nfe, next(guided).nfe) for _ in range(2)] == [(5, 10), (5, 10)]
