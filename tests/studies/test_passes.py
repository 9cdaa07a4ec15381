import pytest

from sims_ray.config import SamplerSettings
from sims_ray.storage.models import SimsModel
from sims_ray.studies.passes import passes, steps_that_take


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("wanted", [1, 2.5, 7, 14, 35.5, 70])
def test_matched_base_takes_at_least_the_evaluations_asked_for_and_one_step_less_takes_fewer(
    solver: str, wanted: float
) -> None:
    settings = SamplerSettings(solver=solver).model_dump(mode="json")  # type: ignore[arg-type]
    steps = steps_that_take(wanted, settings)

    def nfe(num_steps: int) -> float:
        return passes({**settings, "num_steps": num_steps}, SimsModel("")).nfe

    assert nfe(steps) >= wanted
    assert steps == 1 or nfe(steps - 1) < wanted
