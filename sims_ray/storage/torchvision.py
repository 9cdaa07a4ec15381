"""torchvision, also beside a torch that it was not built for."""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache

import torch

MISSING_OPERATORS = ("nms", "qnms")


def import_torchvision() -> None:
    """Import torchvision; beside a torch that it was not built for, with the operators declared that it misses.

    The builds that package indices hold are for CUDA, and do not import beside torch for CPUs for want of two operators
    that nothing here uses. A torchvision that imports is left as it is.

    Raises:
        ImportError, RuntimeError: it is not installed, or broken in another way.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_operators()
        importlib.import_module("torchvision")


@lru_cache(maxsize=1)  # for the operators go with the library
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in MISSING_OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library
