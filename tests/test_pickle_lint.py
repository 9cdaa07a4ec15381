"""No source of the package reads a pickle, or a torch or numpy file that may hold one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sims_ray

PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLE_READERS = {"load", "loads", "Unpickler", "_Unpickler", "open", "*"}
READERS = {"pandas.read_pickle", "pandas.io.pickle.read_pickle"}


def offences(source: str) -> list[str]:
    """What a source has that could unpickle, as `line: name`."""
    tree = ast.parse(source)
    names = dict(imported_names(tree))
    found = {(node.lineno, name) for node, name in references(tree, names) if reads_pickles(name)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found |= {(node.lineno, name) for node in calls if (name := unsafe_call(node, names))}
    return [f"{line}: {name}" for line, name in sorted(found)]


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Names that imports bind, with the full name of what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module or ''}.{alias.name}"


def references(tree: ast.AST, names: dict[str, str]) -> Iterator[tuple[ast.expr | ast.alias, str]]:
    """Every name that a source uses or imports, in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node, full_name(node, names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias, f"{node.module or ''}.{alias.name}") for alias in node.names)


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def reads_pickles(name: str) -> bool:
    *modules, last = name.split(".")
    return name in READERS or (last in PICKLE_READERS and not PICKLE_MODULES.isdisjoint(modules))


def unsafe_call(node: ast.Call, names: dict[str, str]) -> str | None:
    """The called function, where it would unpickle with these arguments."""
    name = full_name(node.func, names)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in ("torch.load", "torch.serialization.load") and not is_constant(keywords.get("weights_only"), True):
        return name
    if "allow_pickle" in keywords and not is_constant(keywords["allow_pickle"], False):
        return f"{name}(allow_pickle)"
    return None


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_source_of_the_package_unpickles() -> None:
    root = Path(sims_ray.__file__).parent
    sources = sorted(root.rglob("*.py"))
    assert len(sources) > 20
    found = {str(path.relative_to(root)): offences(path.read_text(encoding="utf-8")) for path in sources}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle\npickle.loads(b)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads\nloads(b)",
        "from pickle import loads as read",
        "from pickle import *",
        "import pickle\nread = pickle.load",
        "import pickle\npickle.Unpickler(f).load()",
        "import pickle\nclass Mine(pickle.Unpickler): ...",
        "from pickle import _Unpickler",
        "import _pickle\n_pickle.loads(b)",
        "import cloudpickle\ncloudpickle.loads(b)",
        "from ray import cloudpickle\ncloudpickle.loads(b)",
        "import ray\nray.cloudpickle.loads(b)",
        "import dill\ndill.load(f)",
        "import joblib\njoblib.load(f)",
        "from joblib import load",
        "import shelve\nshelve.open('x')",
        "import marshal\nmarshal.loads(b)",
        "import pandas as pd\npd.read_pickle('x')",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import torch\ntorch.load(f, **options)",
        "from torch import load\nload(f)",
        "import torch as t\nt.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=flag)",
        "from numpy import load\nload(f, allow_pickle=True)",
        "def f():\n    import pickle\n    return [pickle.loads(b) for b in x]",
    ],
)
def test_the_lint_finds_a_planted_offender(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True, map_location='cpu')",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import pickle\npickle.dumps(x)",
        "import pickletools\npickletools.genops(f)",
        "import json\njson.loads(text)",
        "import yaml\nyaml.safe_load(text)",
        "def load(x): ...\nload(x)",
        "text = 'pickle.load(f)'  # torch.load(f)",
    ],
)
def test_the_lint_leaves_the_innocent_alone(source: str) -> None:
    assert offences(source) == []
