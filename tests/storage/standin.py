"""Stand-ins for the snapshots of EDM and EDM2: the same pickle layout, written without NVIDIA's code.

Modules named like theirs exist while a stand-in is pickled, and no longer. Their loader is imitated too, so that
a test can show that what it feeds the importer would really run.
"""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from sims_ray.nn.networks import build_network

NETWORK_KINDS = {"EDM2Precond": "Precond", "EDM2UNet": "UNet"}  # where our class has another name than theirs
ARCHITECTURES = {"SongUNet": "song_unet", "DhariwalUNet": "adm_unet", None: "edm2_unet"}
INNER_KWARGS = {"init_weight": np.sqrt(1 / 3)}  # theirs hold such numpy scalars too
PLAIN = (bool, int, float, str, type(None))


class EasyDict(dict[str, Any]):
    """As dnnlib.util.EasyDict."""


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> object:
    """Runs the source that comes with an object, as theirs does."""
    exec(meta["module_src"], {})
    return object()


def as_global(function: Callable[..., Any] | type, module: str, name: str | None = None) -> Any:
    """The function or class under another module's name, as pickle sees it."""
    function.__module__ = module
    function.__qualname__ = function.__name__ = name or function.__name__
    return function


as_global(EasyDict, "dnnlib.util")
as_global(_reconstruct_persistent_obj, "torch_utils.persistence")


@contextmanager
def modules(*globals_: Any) -> Iterator[None]:
    """Modules that hold these globals, for as long as something is pickled or unpickled."""
    made: dict[str, ModuleType] = {}
    for item in (EasyDict, _reconstruct_persistent_obj, *globals_):
        parent, _, _ = item.__module__.rpartition(".")
        for name in filter(None, (parent, item.__module__)):
            made.setdefault(name, ModuleType(name))
        setattr(made[item.__module__], item.__name__, item)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Call:
    """Pickles as a call of a global; unpickling would make it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def persistent(kind: str, state: dict[str, Any], source: str = "", version: int = 6) -> Call:
    """An object of a class under torch_utils.persistence."""
    meta = {"type": "class", "version": version, "module_src": source, "class_name": kind, "state": state}
    return Call(_reconstruct_persistent_obj, meta)


def module_tree(module: nn.Module, source: str, kwargs: dict[str, Any] | None = None, version: int = 6) -> Any:
    """A network's modules as they lie in a snapshot."""
    children = OrderedDict((name, module_tree(child, source, {}, version)) for name, child in module.named_children())
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = children
        return plain
    kind = type(module).__name__
    state = {k: v for k, v in vars(module).items() if k.startswith("_") or isinstance(v, PLAIN)}
    state |= {"_modules": children, "_init_args": (), "_init_kwargs": kwargs or INNER_KWARGS}
    state["_buffers"] = OrderedDict(module._buffers)
    state["_parameters"] = OrderedDict(module._parameters)
    return persistent(NETWORK_KINDS.get(kind, kind), state, source, version)


def marker_source(marker: Path) -> str:
    """Python that makes a file when it is run."""
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"


def network(kwargs: dict[str, Any]) -> nn.Module:
    """Our network for the constructor arguments of one of theirs."""
    settings = {k: v for k, v in kwargs.items() if k not in ("use_fp16", "model_type")}
    return build_network({**settings, "architecture": ARCHITECTURES[kwargs.get("model_type")]})


def snapshot(net: nn.Module, kwargs: dict[str, Any], marker: Path) -> dict[str, Any]:
    """The content of a snapshot of EDM, or of EDM2 where `kwargs` name no model type."""
    source = marker_source(marker)
    loss = persistent("EDMLoss", {"P_mean": -1.2, "P_std": np.float64(1.2), "_init_args": ()}, source)
    ema = module_tree(net, source, kwargs)
    if "model_type" in kwargs:
        pipe = persistent("AugmentPipe", {"xflip": 1e8, "_init_args": ()}, source)
        return {"ema": ema, "loss_fn": loss, "augment_pipe": pipe, "dataset_kwargs": {"path": "images.zip"}}
    latents = {"scale": np.float32(0.5) / np.array([4.17, 4.62], np.float32), "batch_size": np.int64(8), "_vae": None}
    encoder = persistent("StabilityVAEEncoder", latents, source)
    return EasyDict(encoder=encoder, loss_fn=loss, dataset_kwargs=EasyDict(path="images.zip"), ema=ema)


def dumps(value: Any, *globals_: Any, protocol: int = 4) -> bytes:
    """Pickle a stand-in; `globals_` are further ones that it names."""
    with modules(*globals_):
        return pickle.dumps(value, protocol=protocol)


def storage_bytes(tensor: torch.Tensor) -> bytes:
    """The nested torch file in which a tensor's values lie."""
    _, (storage, *_) = tensor.__reduce_ex__(4)  # type: ignore[no-untyped-call]
    _, (content,) = storage.__reduce__()
    return bytes(content)
