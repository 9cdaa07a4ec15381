import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib, json, sys, time
start = time.perf_counter()
for name in {modules!r}:
    importlib.import_module(name)
print(json.dumps([time.perf_counter() - start, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""


def imported(*modules: str) -> tuple[float, set[str]]:
    """Seconds that a fresh process takes to import modules, and the top-level packages it then has."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(modules=modules)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result: list[Any] = json.loads(done.stdout)
    return result[0], set(result[1])


def test_importing_the_package_takes_less_than_a_second_and_loads_no_library() -> None:
    seconds, packages = imported("sims_ray")
    assert seconds < 1
    assert not packages & {"ray", "mlflow", "torch", "numpy", "pydantic", "pyarrow"}


@pytest.mark.parametrize("module", ["sims_ray.config", "sims_ray.cli"])
def test_settings_and_the_command_line_load_neither_ray_nor_mlflow_nor_torch(module: str) -> None:
    _, packages = imported(module)
    assert "pydantic" in packages
    assert not packages & {"ray", "mlflow", "torch"}


def test_networks_samplers_and_metrics_load_without_the_system_around_them() -> None:
    _, packages = imported("sims_ray.nn.precond", "sims_ray.diffusion.sampler", "sims_ray.metrics.frechet")
    assert "torch" in packages
    assert not packages & {"pydantic", "ray", "mlflow", "pyarrow", "yaml", "sklearn", "PIL", "typer"}
