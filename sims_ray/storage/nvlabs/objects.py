"""What the globals in a snapshot of EDM or EDM2 stand for: inert records, tensors and numbers.

Objects keep their class's name and their state; the source code that comes with them is dropped unread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from io import BytesIO
from mmap import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sims_ray.storage.nvlabs.reader import (
    DAMAGED,
    HOSTILE,
    Global,
    Makers,
    Persistent,
    Refusal,
    Stateful,
    run_pickle,
    shown,
)

PERSISTENCE_VERSION = 6
MAX_DIMS = 8
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # opens what torch.save wrote before it used zip
TORCH_PROTOCOL = 1001
STORAGE_BYTES = {  # of one value
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
NUMPY_CODES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
NO_STORAGE = f"has a nested file that is no torch storage, {HOSTILE}"


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Values [N] that tensors are views of."""

    values: Tensor


@dataclass(slots=True, eq=False)
class Record:
    """What is left of an object.

    Attributes:
        kind: name of its class.
        state: its attributes.
    """

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


class _ModuleDict(Record, Stateful):
    __slots__ = ()

    def set_state(self, state: Any) -> None:
        if type(state) is not dict:
            raise TypeError("not the state of a module")
        self.state = state


@dataclass(frozen=True, slots=True, eq=False)
class _Dtype(Stateful):
    code: str

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or state[1] not in ("<", "|", "="):
            raise TypeError("not a byte order of this machine")


class Array(Stateful):
    """An array of numbers, as bytes until its values are asked for."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def set_state(self, state: Any) -> None:
        """Take the shape, the type and the bytes."""
        _, _, dtype, _, content = state
        if not isinstance(dtype, _Dtype) or type(content) not in (bytes, str):  # text: the bytes of Python 2
            raise TypeError("not an array of numbers")
        self.state = state

    def values(self) -> NDArray[Any]:
        """The array.

        Raises:
            ValueError, TypeError: its bytes do not make up its shape.
        """
        _, shape, dtype, by_column, content = self.state
        held = content.encode("latin-1") if type(content) is str else content
        return np.frombuffer(held, dtype.code).reshape(shape, order="F" if by_column else "C")


def read_objects(file: mmap) -> Any:
    """Read a snapshot into plain values, `Record`s and tensors.

    Raises:
        Refusal: it has what a snapshot does not, or is damaged.
    """
    storages = _Storages(len(file))
    return run_pickle(file, {**GLOBALS, ("torch.storage", "_load_from_bytes"): storages.load})


def _persistent_object(meta: Any) -> Record:
    """An object of torch_utils.persistence; its loader would execute `meta["module_src"]`, which is ignored here."""
    if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("state")) is not dict:
        raise Refusal("holds an object that torch_utils.persistence did not write; give the .pkl that NVIDIA published")
    version, name = meta.get("version"), meta.get("class_name")
    if type(version) is not int or version != PERSISTENCE_VERSION:
        found = version if type(version) is int else shown(version)
        raise Refusal(
            f"was written by version {found} of torch_utils.persistence, but only version {PERSISTENCE_VERSION} "
            "can be read; give a snapshot of EDM or EDM2"
        )
    if type(name) is not str or not name.isidentifier():
        raise Refusal(f"has an object of class {shown(name)}, {HOSTILE}")
    return Record(name, meta["state"])


def _mapping() -> dict[str, Any]:
    return {}


def _module_dict() -> Record:
    return _ModuleDict("ModuleDict")


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError("not a tensor")
    return tensor


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    """A view of a storage; one that reaches beyond it, or repeats its values, is refused."""
    if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple:
        raise TypeError("not a tensor")
    if len(size) > MAX_DIMS or any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise TypeError("not the shape of a tensor")
    held, numel = storage.values.numel(), math.prod(size)
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if numel else offset
    if max(reach, numel) > held:
        raise Refusal(f"declares a tensor of {max(reach, numel)} values in a storage of {held}; it may be hostile")
    return storage.values.as_strided(size, stride, offset)


class _Storages:
    """Reads the storages of one file, together no more than the file has bytes: one may be named many times."""

    def __init__(self, limit_bytes: int) -> None:
        self.left_bytes = limit_bytes

    def load(self, content: Any) -> Storage:
        """Read the storage in a nested torch file."""
        numel = _check_storage(content)
        self.left_bytes -= len(content)
        if self.left_bytes < 0:
            raise Refusal("loads more bytes than it has; it may be hostile")
        try:
            loaded = torch.load(BytesIO(content), weights_only=True, map_location="cpu")
        except Exception as error:  # whatever a loader makes of a hostile file
            raise Refusal(f"has a nested storage that torch refuses ({type(error).__name__}): {DAMAGED}") from None
        if not isinstance(loaded, torch.storage.TypedStorage):
            raise Refusal(NO_STORAGE)
        values = torch.empty(0, dtype=loaded.dtype).set_(loaded)
        if values.numel() != numel:
            raise Refusal(NO_STORAGE)
        return Storage(values)


def _check_storage(content: Any) -> int:
    """Number of values in a nested torch file, checked because torch.load would allocate whatever it declares.

    The file is five pickles (magic number, protocol, system, storage, keys), the number again, and the values.
    """
    if type(content) is not bytes or content[:1] != b"\x80":
        raise Refusal(NO_STORAGE)
    file = BytesIO(content)
    magic, protocol, _, storage, keys = [run_pickle(file, STORAGE_GLOBALS, persistent=True) for _ in range(5)]
    identity = storage.identity if isinstance(storage, Persistent) else None
    if magic != TORCH_MAGIC or protocol != TORCH_PROTOCOL or type(identity) is not tuple or len(identity) != 6:
        raise Refusal(NO_STORAGE)
    word, kind, key, _, numel, view = identity
    if word != "storage" or not isinstance(kind, Global) or type(key) is not str or type(numel) is not int:
        raise Refusal(NO_STORAGE)
    if view is not None or type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != key:
        raise Refusal(NO_STORAGE)
    start, width = file.tell() + 8, STORAGE_BYTES[kind.name]
    again = int.from_bytes(content[start - 8 : start], "little", signed=True)
    if numel < 0 or again != numel or len(content) != start + numel * width:
        held = max(len(content) - start, 0) // width
        raise Refusal(f"declares a storage of {numel} values but holds {held}; it is cut off or hostile")
    return numel


def _numpy_dtype(code: Any, align: Any = False, copy: Any = True) -> _Dtype:
    if type(code) is not str or code.lstrip("<|=") not in NUMPY_CODES:
        raise Refusal(f"has the numpy type {shown(code)}, {HOSTILE}")
    return _Dtype(code)


def _numpy_scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, _Dtype) or type(content) is not bytes:
        raise TypeError("not a number")
    (value,) = np.frombuffer(content, dtype.code)
    return value.item()


def _numpy_array(kind: Any, shape: Any, code: Any) -> Array:
    if not isinstance(kind, Global) or kind.name != "ndarray":
        raise TypeError("not an array")
    return Array()


STORAGE_GLOBALS: Makers = {("torch", name): None for name in STORAGE_BYTES}
NUMPY_GLOBALS: Makers = {
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy", "ndarray"): None,
    ("numpy.core.multiarray", "_reconstruct"): _numpy_array,
    ("numpy._core.multiarray", "_reconstruct"): _numpy_array,
}
GLOBALS: Makers = {
    **NUMPY_GLOBALS,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("collections", "OrderedDict"): _mapping,
    ("dnnlib.util", "EasyDict"): _mapping,
    ("torch.nn.modules.container", "ModuleDict"): _module_dict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
