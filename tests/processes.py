"""Processes of one test, found by a mark in their environment, so that no other's are ever touched."""

import os
import signal
from pathlib import Path

MARK = "SIMS_RAY_TEST_RUN"


def environment(mark: str, **extra: str) -> dict[str, str]:
    """This process's environment without a Ray address, with the mark."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, MARK: mark, **extra}


def marked(mark: str) -> list[int]:
    """Processes, Ray's own included, that were started under this mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def end(mark: str) -> None:
    """Kill what is left under this mark."""
    for pid in marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def titled(mark: str, title: str) -> list[int]:
    """Processes under this mark whose title starts so, like Ray's actors of a class: 'ray::RayTrainWorker'."""
    found = []
    for pid in marked(mark):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                found.append(pid)
        except OSError:
            continue
    return sorted(found)


def parent(pid: int) -> int:
    """The process that started another one."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
