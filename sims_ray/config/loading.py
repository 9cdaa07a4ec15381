"""Recipes: built-in ones by name, the user's own as YAML files, single settings overridden on the way."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sims_ray.config.architecture import network_entry
from sims_ray.config.presets import PRESETS_FILE, presets
from sims_ray.config.settings import Recipe
from sims_ray.errors import SimsError


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by built-in name or YAML path and apply `section.key=value` overrides (values are YAML).

    Raises:
        SimsError: no such recipe, or a setting that is unknown, of the wrong type or out of range.
    """
    tree, where = _read(source)
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        locations = {e["loc"] for e in error.errors()}
        # A container is said to be too short when it is one of its items that is wrong: say the item only.
        causes = [
            e for e in error.errors() if not any(e["loc"] == loc[: len(e["loc"])] for loc in locations - {e["loc"]})
        ]
        raise SimsError("; ".join(_explain(e) for e in causes) + f" (recipe {where})") from None


def preset_network(name: str) -> dict[str, Any]:
    """The network of a published model, as `nn.networks.build_network` takes it."""
    recipe, preset = load_recipe(name), presets()[name]
    return network_entry(recipe.network, preset.shape, preset.num_classes, bool(recipe.train.augment))


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with the package: those in files of their own, then the papers' presets."""
    files = sorted(p.name for p in _recipe_folder().iterdir() if p.name.endswith(".yaml") and p.name != PRESETS_FILE)
    return [*(name.removesuffix(".yaml") for name in files), *presets()]


def _recipe_folder() -> Any:
    return resources.files("sims_ray") / "recipes"


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    """The settings of a recipe as YAML has them, and how to call it in a message."""
    known = builtin_recipes()
    if str(source) in presets():
        return presets()[str(source)].recipe, str(source)
    if str(source) in known:
        return _parse((_recipe_folder() / f"{source}.yaml").read_text(), str(source)), str(source)
    path = Path(source)
    if not path.is_file():
        raise SimsError(f"no recipe {str(source)!r}: give a YAML file, or one of {', '.join(known)}")
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path)), str(path)
    except UnicodeDecodeError:
        raise SimsError(f"{path} is not UTF-8 text; give a recipe in YAML") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SimsError(f"{where} is not valid YAML ({_one_line(error)}); correct that line") from error
    if not isinstance(tree, dict):
        raise SimsError(
            f"{where} holds {type(tree).__name__}, not settings; write it as `section:` blocks of `key: value`"
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SimsError(f"--set {override!r} is not of the form section.key=value; write for example train.lr=1e-3")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise SimsError(f"--set {key}: {parent} is a value, not a section; name a setting that exists")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SimsError(f"--set {key}: {value!r} is not a YAML value ({_one_line(error)})") from error


def _explain(error: Mapping[str, Any]) -> str:
    """One sentence for one pydantic error: dotted name, value found, what is allowed."""
    name = ".".join(str(part) for part in error["loc"])
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{name} is not a setting; {hint}"
    if kind == "missing":
        return f"{name} is missing; give it in the recipe or with --set {name}=..."
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{name}.{message}" if name else message
    return f"{name}={error['input']!r} is not allowed: {message[0].lower()}{message[1:]}"


def _known_keys(section: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in section:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
