"""One maker at a time: who comes second waits, and takes over when the first has died."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger("sims_ray")


@contextmanager
def alone(path: Path, doing: str) -> Iterator[None]:
    """Be the only process, of any machine that sees the folder, that is in here with this lock file.

    The operating system lets go of the lock when its holder ends, however it ends.

    Args:
        path: the lock file; left in place, as removing it would let two processes in.
        doing: what is being made, for the message of who waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: another process is at it; waiting until it is done, or gone", doing)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
