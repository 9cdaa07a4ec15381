from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from sims_ray.cli import app
from sims_ray.config import Recipe, builtin_recipes, load_recipe
from sims_ray.errors import SimsError


def leaves(model: BaseModel, prefix: str = "") -> list[tuple[BaseModel, str]]:
    found: list[tuple[BaseModel, str]] = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [(model, name)]
    return found


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_loads_under_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # unknown keys
        ("train.lrr=1", ["train.lrr is not a setting", "did you mean lr?"]),
        ("trian.lr=1", ["trian is not a setting", "did you mean train?"]),
        ("sampler.xyzzy=1", ["sampler.xyzzy is not a setting", "num_steps, sigma_min"]),
        # wrong types
        ("train.lr=fast", ["train.lr='fast'", "valid number"]),
        ("train.lr=", ["train.lr=None", "valid number"]),
        ("train.batch_size=1.5", ["train.batch_size=1.5", "valid integer"]),
        ("network.channel_mult=2", ["network.channel_mult=2", "valid tuple"]),
        ("data=digits", ["data='digits'", "valid dictionary"]),
        ("features.kind=vgg", ["features.kind='vgg'", "'dinov2' or 'pixels'"]),
        # out of range
        ("train.lr=-1", ["train.lr=-1", "greater than 0"]),
        ("train.lr=.inf", ["train.lr=inf", "finite number"]),
        ("train.lr=.nan", ["train.lr=nan", "finite number"]),
        ("train.batch_size=0", ["train.batch_size=0", "greater than or equal to 1"]),
        ("train.seed=4294967296", ["train.seed=4294967296", "less than 4294967296"]),
        ("network.dropout=1", ["network.dropout=1", "less than 1"]),
        ("network.model_channels=10", ["network.model_channels=10", "multiple of 4"]),
        ("network.channel_mult=[1,0]", ["network.channel_mult.1=0", "greater than or equal to 1"]),
        ("finetune.budgets_kimg=[]", ["finetune.budgets_kimg=[]", "at least 1"]),
        ("tune.omega=[1,30]", ["tune.omega.1=30", "less than or equal to 20"]),
        ("name=a b", ["name='a b'", "match pattern"]),
        # settings that do not fit each other
        ("finetune.budgets_kimg=[2,1]", ["finetune", "must increase"]),
        ("sampler.sigma_min=100", ["sampler", "sigma_min=100 must be below sigma_max=80"]),
        ("tune.omega=[0,-1]", ["tune", "needs a value above 0"]),
        ("tune.omega=[1,1]", ["tune", "must not repeat"]),
        ("train.batch_size=255", ["train.batch_size=255 must divide by compute.num_workers=2"]),
        ("finetune.batch_size=255", ["finetune.batch_size=255 must divide by compute.num_workers=2"]),
        # not an override
        ("train.lr", ["--set 'train.lr'", "section.key=value"]),
        ("=3", ["--set '=3'", "section.key=value"]),
        ("train.lr=[1", ["--set train.lr", "'[1' is not a YAML value"]),
        ("train.lr.x=1", ["--set train.lr.x", "lr is a value, not a section"]),
    ],
)
def test_a_wrong_setting_gives_one_sentence_with_its_name_its_value_and_what_is_allowed(
    override: str, said: list[str]
) -> None:
    with pytest.raises(SimsError) as error:
        load_recipe("digits", [override])
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message
    assert "pydantic" not in message


def test_settings_that_are_missing_are_all_named(tmp_path: Path) -> None:
    tree = load_recipe("digits").model_dump(mode="json")
    del tree["finetune"]["budgets_kimg"], tree["tune"]["n_s"]
    path = tmp_path / "partial.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(SimsError) as error:
        load_recipe(path)
    for name in ("finetune.budgets_kimg", "tune.n_s"):
        assert f"{name} is missing; give it in the recipe or with --set {name}=..." in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"), [("- 1\n- 2\n", "holds list"), ("a: [1\n", "not valid YAML"), ("", "name is missing")]
)
def test_a_file_that_holds_no_settings_is_refused_by_name(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(SimsError, match=said) as error:
        load_recipe(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_is_answered_with_those_that_exist() -> None:
    with pytest.raises(SimsError, match=r"no recipe 'digitz'.*digits"):
        load_recipe("digitz")


def test_overrides_are_applied_in_order_and_read_as_yaml() -> None:
    recipe = load_recipe(
        "digits", ["train.lr=1", "train.lr=1e-3", "tune.omega=[0, 2.5]", "tracking.uri=null", "network.conditional=yes"]
    )
    assert recipe.train.lr == 1e-3
    assert recipe.tune.omega == (0, 2.5)
    assert recipe.tracking.uri is None
    assert recipe.network.conditional is True


SIZES = ("tune.n_s=[4000]", "tune.n_images=1000", "evaluate.n_images=1000", "evaluate.blocks=3")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["seeds.selection=3999"],
            "0..3999 of synthesis overlap 3999..4998 of selection; move seeds.selection to 4000",
        ),
        (["seeds.report=1000000999"], "of selection overlap 1000000999..1000003998 of report"),
        (["seeds.synthesis=2000002999"], "of report overlap 2000002999..2000006998 of synthesis"),
        (["tune.n_s=[4000, 1000000001]"], "of synthesis overlap"),
        (["seeds.preview=2000000000", "seeds.preview_nimg=1"], "overlap"),
        (["seeds.preview=4294967295"], "seeds.preview ends beyond 4294967295"),
    ],
)
def test_seed_ranges_that_overlap_or_pass_the_limit_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(SimsError) as error:
        load_recipe("digits", [*SIZES, *overrides])
    assert said in str(error.value)


def test_seed_ranges_may_touch_and_reach_the_limit() -> None:
    starts = ["seeds.selection=4000", "seeds.report=5000", "seeds.preview=4294967232"]
    recipe = load_recipe("digits", [*SIZES, *starts])
    ledger = recipe.seed_ledger()
    assert ledger["selection"] == range(4000, 5000)
    assert ledger["report"] == range(5000, 8000)
    assert ledger["preview"].stop == 2**32
    assert sum(len(seeds) for seeds in ledger.values()) == len(set().union(*ledger.values()))


def test_every_setting_is_frozen() -> None:
    settings = leaves(load_recipe("digits"))
    assert len(settings) > 50
    for model, name in settings:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, name, getattr(model, name))


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_printed_settings_load_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    options = ["--set", "train.lr=3e-4", "--set", "tune.n_s=[100,200]", "--set", "seeds.preview_nimg=9"]
    printed = CliRunner().invoke(app, ["config", name, *options])
    assert printed.exit_code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(printed.stdout)
    assert load_recipe(path) == load_recipe(name, options[1::2])


def test_every_recipe_of_settings_survives_the_way_to_plain_values_and_back() -> None:
    recipe = load_recipe("digits")
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert Recipe.model_validate(plain) == recipe
