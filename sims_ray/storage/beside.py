"""Files on their way: written beside their name and renamed, so that a name never stands for half a file."""

from __future__ import annotations

import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_S = 24 * 3600.0  # a file beside that is older was left by a process that is gone, on whatever node
BESIDE = re.compile(r"^(?P<head>\..+)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp$")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed onto `path` on success, removed on failure."""
    beside = hidden_path(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def hidden_path(path: Path) -> Path:
    """A path beside `path` that `Folder.files` does not list and `Folder.sweep` removes once this process is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def is_abandoned(path: Path) -> bool:
    """Whether a process that is gone was writing this; of another node's that is a guess from its age."""
    match = BESIDE.match(path.name)
    if match is None:
        return False
    if match["head"].endswith(f".{platform.node()}"):
        try:
            os.kill(int(match["pid"]), 0)  # signal 0 only asks
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            return False
        return False
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > STALE_S
    return False
