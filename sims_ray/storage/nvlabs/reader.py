"""A pickle interpreter that imports nothing and calls only what it is given.

A pickle is a program. `pickle.Unpickler` gives a hostile one too much even with `find_class` closed: a memo index
of four bytes fills gigabytes, a deep tuple as a key crashes the process, and BUILD alters any object within reach.
This interpreter knows the instructions that a snapshot of EDM or EDM2 has, and on request the strings of Python 2,
and refuses all others by name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from mmap import mmap
from typing import Any

PROTOCOLS = range(2, 6)
MAX_SHOWN = 80  # characters of a name from the file in a message
SNAPSHOT = "EDM or EDM2 snapshot"
HOSTILE = f"which no {SNAPSHOT} contains; it may be hostile, do not open it with other tools"
DAMAGED = "it is cut off or damaged; download it again"

ARGUMENTS = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
})  # fmt: skip  # instructions that push their argument; not LONG4: numbers of any length are slow to compute with
STRINGS = frozenset({"SHORT_BINSTRING", "BINSTRING"})  # of Python 2: text or bytes, here as Latin-1
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refusal(Exception):
    """Why a file is refused: a sentence that goes on after the file's name."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A global that the stream names."""

    module: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """What the stream leaves to its reader, such as the data of a storage."""

    identity: Any


class Stateful:
    """An object whose state the stream may set."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        """Take the state, or raise TypeError where it is no state of this object."""
        raise NotImplementedError


Makers = Mapping[tuple[str, str], Callable[..., Any] | None]
"""What may be named, as (module, name), and what makes the object when it is called; None: not to be called."""


def shown(value: object) -> str:
    """A name from a file, made fit for a message."""
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    return "".join(c if c.isprintable() else "?" for c in value[:MAX_SHOWN])


def run_pickle(
    file: mmap | BytesIO, makers: Makers, persistent: bool = False, *, kind: str = SNAPSHOT, strings: bool = False
) -> Any:
    """Run one pickle; the file stays right behind it.

    Args:
        file: whose `read` never returns more than there is, however much is asked for.
        makers: the globals that may be named.
        persistent: whether persistent ids may occur; they become `Persistent`.
        kind: what the file should be, for messages.
        strings: whether strings of Python 2 may occur.

    Raises:
        Refusal: the pickle has a global or an instruction that is not known here, or is damaged.
    """
    machine = _Machine(makers, persistent, kind, strings)
    position = file.tell()
    try:
        for opcode, argument, found in pickletools.genops(file):  # type: ignore[arg-type]
            position = found or 0
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except (LookupError, OverflowError, TypeError, ValueError):
        raise Refusal(f"cannot be read after byte {position}: {DAMAGED}") from None
    except (MemoryError, RecursionError) as error:
        raise Refusal(f"asks for too much after byte {position} ({type(error).__name__}); it may be hostile") from None
    return value


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self, makers: Makers, persistent: bool, kind: str, strings: bool) -> None:
        self.makers, self.persistent = makers, persistent
        self.hostile = HOSTILE.replace(SNAPSHOT, kind)
        self.pushed = ARGUMENTS | STRINGS if strings else ARGUMENTS
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what lies under each mark
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Run one instruction."""
        if name in self.pushed:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            items = [self.stack.pop() for _ in range(TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        else:
            self._step_on(name, argument)

    def _step_on(self, name: str, argument: Any) -> None:
        match name:
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self._marked()
                self.stack.append(tuple(items))
            case "SETITEM":
                value, key = self.stack.pop(), self.stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._marked())
            case "APPEND" | "APPENDS" | "ADDITEMS":
                self._extend([self.stack.pop()] if name == "APPEND" else self._marked())
            case "GLOBAL":
                self._name(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                word, module = self.stack.pop(), self.stack.pop()
                self._name(module, word)
            case "REDUCE" | "NEWOBJ":
                arguments, maker = self.stack.pop(), self.stack.pop()
                self._make(maker, arguments)
            case "BUILD":
                self._build(self.stack.pop())
            case "BINPERSID" if self.persistent:
                self.stack.append(Persistent(self.stack.pop()))
            case "PROTO" if argument not in PROTOCOLS:
                raise Refusal(f"is a pickle of protocol {argument}, not 2 to 5; give the file as it was published")
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise Refusal(f"has the pickle instruction {name}, {self.hostile}")

    def _marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(target) is not dict or type(key) not in (str, int):  # the hash of a nested key can crash
                raise TypeError("not an item of a mapping")
            target[key] = value

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set and all(type(item) is str for item in items):
            target.update(items)
        else:
            raise TypeError("not a list or a set of names")

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("not the name of a global")
        if (module, name) not in self.makers:
            raise Refusal(f"names the global {shown(f'{module}.{name}')}, {self.hostile}")
        self.stack.append(Global(module, name))

    def _make(self, maker: Any, arguments: Any) -> None:
        if not isinstance(maker, Global) or type(arguments) is not tuple:
            raise TypeError("not a call")
        make = self.makers[maker.module, maker.name]
        if make is None:
            raise Refusal(f"calls {maker.module}.{maker.name}, {self.hostile}")
        self.stack.append(make(*arguments))

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, Stateful):
            raise Refusal(f"sets the state of an object of type {type(target).__name__}, {self.hostile}")
        target.set_state(state)
