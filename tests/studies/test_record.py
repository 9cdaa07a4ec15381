from importlib import metadata
from pathlib import Path

from sims_ray.config import load_recipe
from sims_ray.studies.record import write_environment
from tests.conftest import TinyRecipe


def test_the_settings_that_a_run_leaves_are_a_recipe_that_resolves_to_them_again(
    tmp_path: Path, tiny: TinyRecipe
) -> None:
    recipe = tiny("tune.w=[0.5]", "guidance.sigma_hi=3", "sampler.num_steps=7")
    settings, _ = write_environment(recipe, tmp_path)
    assert load_recipe(str(settings), []) == recipe


def test_the_packages_that_a_run_leaves_are_those_that_are_installed(tmp_path: Path, tiny: TinyRecipe) -> None:
    _, packages = write_environment(tiny(), tmp_path)
    lines = packages.read_text().splitlines()
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))
    assert {f"{name}=={metadata.version(name)}" for name in ("torch", "ray", "mlflow")} <= set(lines)


def test_files_of_an_unchanged_environment_are_left_alone(tmp_path: Path, tiny: TinyRecipe) -> None:
    first = [path.stat().st_ino for path in write_environment(tiny(), tmp_path)]
    assert [path.stat().st_ino for path in write_environment(tiny(), tmp_path)] == first
    settings, packages = write_environment(tiny("sampler.num_steps=7"), tmp_path)
    assert settings.stat().st_ino != first[0] and packages.stat().st_ino == first[1]
