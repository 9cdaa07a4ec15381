import json
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from sims_ray.data.importers import import_images
from sims_ray.errors import SimsError
from sims_ray.studies.sims import SimsRun
from tests.conftest import TinyRecipe


def times(out: Path) -> dict[str, int]:
    return {
        str(p.relative_to(out)): p.stat().st_mtime_ns
        for p in out.rglob("*")
        if p.is_file() and "mlflow" not in p.name and p.suffix != ".lock"
    }


def test_a_second_run_reruns_nothing_and_says_the_same(tiny: TinyRecipe, out: Path) -> None:
    first = SimsRun(tiny("tracking.enabled=true"), out).report()
    before = times(out)
    run = SimsRun(tiny("tracking.enabled=true"), out)
    assert run.report() == first
    assert times(out) == before
    assert "to do" not in run.describe()
    matched = ["base, matched evaluations", "base, matched training"]
    assert [row["model"] for row in first["table"]] == ["base", *matched, "auxiliary", "SIMS"]
    assert json.loads((out / "result.json").read_text())["table"] == first["table"]
    assert (out / "report" / "report.html").stat().st_size > 1e6
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "sims"]
    runs = client.search_runs([experiment.experiment_id])
    assert {r.info.status for r in runs} == {"FINISHED"}
    names = sorted(r.data.tags["mlflow.runName"] for r in runs)
    assert len(names) == len(set(names)) and "sweep" in names and "digits" in names
    sweep = next(r for r in runs if r.data.tags["mlflow.runName"] == "sweep")
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == sweep.info.run_id]
    assert len(children) == 5 and all("fd_classifier" in r.data.metrics for r in children)


def test_a_changed_search_reuses_what_it_does_not_touch(tiny: TinyRecipe, out: Path) -> None:
    SimsRun(tiny(), out).tune()
    before = times(out)
    wider = SimsRun(tiny("tune.omega=[-1,0,1,2]"), out)
    wider.tune()
    after = times(out)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"settings.yaml"}
    new = {Path(name).parts[1].split("-")[0] for name in after.keys() - before.keys()}
    assert new == {"evaluate", "tune"}


def test_a_search_with_more_budgets_trains_on_and_measures_only_what_is_new(tiny: TinyRecipe, out: Path) -> None:
    tracked = "tracking.enabled=true"
    SimsRun(tiny("finetune.budgets_kimg=[0.5]", tracked), out).tune()
    before = times(out)
    wider = SimsRun(tiny("finetune.budgets_kimg=[0.5,1]", tracked), out)
    job = wider.plan.finetune_job(96)
    (row,) = [line for line in wider.describe().splitlines() if line.startswith("finetune")]
    assert "to do: B=1 kimg" in row and str(job.artifact.path) in row
    wider.tune()
    after = times(out)
    changed = {name for name in before if name.startswith("artifacts") and after.get(name) != before[name]}
    folder = f"artifacts/{job.artifact.path.name}"
    gone = "state-000000000512.safetensors"
    assert changed == {f"{folder}/{name}" for name in ("manifest.json", "metrics.jsonl", "settings.json", gone)}
    added = [name for name in after.keys() - before.keys() if name.endswith("manifest.json")]
    assert sorted(Path(name).parent.name.split("-")[0] for name in added) == ["evaluate", "evaluate", "tune"]
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "sims"]
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [r for r in runs if r.data.tags["mlflow.runName"].startswith("finetune")]
    assert run.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == [row["nimg"] for row in job.log_rows()] and steps[-1] == 1024
    assert run.data.params["policy.0.5kimg.lr"] == "0.002" and run.data.params["start"] == "ema"


def test_a_base_can_be_trained_on_and_the_report_of_the_shorter_one_stays_as_it_is(tiny: TinyRecipe, out: Path) -> None:
    alone = "evaluate.matched=false"
    first = SimsRun(tiny(alone), out).report()
    longer = SimsRun(tiny("train.duration_kimg=3", alone), out)
    assert "to do: B=3 kimg" in longer.describe()
    second = longer.report()
    assert longer.plan.base_artifact.path.parent == out / "artifacts"
    assert len(list(longer.plan.base_artifact.path.glob("ema-*"))) == 2
    assert second["losses"]["base"][: len(first["losses"]["base"])] == first["losses"]["base"]
    assert second["table"] != first["table"]
    assert SimsRun(tiny(alone), out).report() == first


def test_dry_run_changes_nothing(tiny: TinyRecipe, out: Path) -> None:
    text = SimsRun(tiny(), out).describe()
    assert not out.exists() and "train base" in text and "to do" in text


def test_own_images_run_end_to_end(tiny: TinyRecipe, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(40):
            level = 60 if label == "dark" else 190
            pixels = (level + rng.integers(-40, 40, (24, 20, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.png")
    import_images(tmp_path / "photos", tmp_path / "table", size=16)
    overrides = ("network.channel_mult=[1,1]", "network.attn_resolutions=[8]", f"data.path={tmp_path / 'table'}")
    summary = SimsRun(tiny(*overrides), tmp_path / "run").report()
    assert summary["num_real"] == 80 and summary["metric"] == "fd_classifier@64"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("data.path=nowhere",), "nowhere has no manifest.json"),
        (("network.channel_mult=[1,1,1,1,1]",), "divide by 16"),
    ],
)
def test_data_that_cannot_work_stops_before_any_work(
    tiny: TinyRecipe, out: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(SimsError, match=sentence):
        SimsRun(tiny(*overrides), out)
    assert not out.exists()


def test_unlabelled_images_need_features_without_labels(tiny: TinyRecipe, tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), i * 20, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    import_images(tmp_path / "photos", tmp_path / "table")
    with pytest.raises(SimsError, match=r"features\.kind=pixels"):
        SimsRun(tiny(f"data.path={tmp_path / 'table'}"), tmp_path / "run")
    run = SimsRun(tiny(f"data.path={tmp_path / 'table'}", "features.kind=pixels"), tmp_path / "run")
    assert run.tune()["selected"]["metric"] == "fd_pixels@64"
