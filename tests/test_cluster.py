import ast
from pathlib import Path

import pytest
import typer
import yaml

from sims_ray.cli import app

ROOT = Path(__file__).parents[1]


def test_cluster_yaml_is_what_the_autoscaler_accepts() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**config, "max_worker": 3}))


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_a_job_is_thin_and_hands_over_to_a_command_that_exists(path: Path) -> None:
    tree = ast.parse(path.read_text())
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    verb = ast.literal_eval(call.args[0].elts[0])  # type: ignore[attr-defined]
    names = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert verb in names
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
