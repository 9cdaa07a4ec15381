"""The resumable states of one training run: written in the background, verified, the newest whole one found again.

with TrainingStates(artifact.path) as states:
    found = states.newest()
    ...
    states.save(nimg, training.state(), {"role": "training state"})
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST, read_manifest
from sims_ray.storage.checkpoints import (
    FULL,
    CorruptFile,
    UnreadableFile,
    load_tensors,
    unwritten,
    verify_tensors,
    write_tensors,
)
from sims_ray.storage.folders import Folder

logger = logging.getLogger("sims_ray")
T = TypeVar("T")

STATE_NAME = re.compile(r"state-(\d{12,})\.safetensors")
BESIDE = ".state-*.safetensors.*.tmp"  # a state that is being written, see `atomic_path`
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 64.0, 64.0, 64.0)  # about five minutes in all
INTACT = "the last checkpoint is intact: "


def state_path(folder: Path, nimg: int) -> Path:
    """Path of the training state at `nimg` images seen."""
    return folder / f"state-{nimg:012d}.safetensors"


def save_patiently(
    path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any], waits_s: Sequence[float] = WAITS_S
) -> None:
    """Write a file of a run as `save_tensors` does; while its storage is away, again after each of `waits_s`.

    The folder must exist: one that is gone is storage that is away, and is not made anew in its place.

    Raises:
        SimsError: the disk is full, which waiting does not change, or the storage stayed away.
    """

    def write() -> None:
        os.stat(path.parent)
        write_tensors(path, tensors, card)

    try:
        _patiently(write, path, waits_s)
    except OSError as error:
        raise unwritten(path, error, tensors, INTACT) from None


class TrainingStates:
    """The states in a run's folder, of which one process writes.

    Args:
        folder: folder of the run's artifact.
        keep: how many of the newest stay.
        waits_s: seconds between attempts while the storage is away.
    """

    def __init__(self, folder: Path, keep: int = 2, waits_s: Sequence[float] = WAITS_S) -> None:
        if keep < 1:
            raise SimsError(f"keep={keep} training states leave none to go on from; keep at least 1")
        self.folder = folder
        self.keep = keep
        self.waits_s = waits_s
        self._thread: Thread | None = None
        self._error: SimsError | None = None
        self._torn: set[int] = set()
        self._host: dict[str, Tensor] = {}

    def save(
        self, nimg: int, tensors: Mapping[str, Tensor], card: Mapping[str, Any], keep_also: Collection[int] = ()
    ) -> None:
        """Copy the tensors to host memory, and write them in the background once the state before is written.

        Then states beyond the newest `keep` go, but for those at `keep_also` images and those that the folder's
        manifest lists. The card gets `nimg`.

        Raises:
            SimsError: the state before could not be written.
        """
        self.close()
        args = (nimg, self._on_host(tensors), {**card, "nimg": nimg}, frozenset(keep_also))
        self._thread = Thread(target=self._write, args=args, name=f"state-{nimg}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the background, without waiting for it.

        Raises:
            SimsError: a state could not be written.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the write in flight.

        Raises:
            SimsError: a state could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> TrainingStates:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except SimsError as own:
            if error is None:
                raise
            logger.warning("%s", own)  # what ended the training comes first

    def newest(
        self, before_nimg: int | None = None, quiet: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and card of the newest whole state; None without one.

        Args:
            before_nimg: only states of fewer images.
            quiet: do not name torn ones in warnings.

        Raises:
            SimsError: the storage stayed away.
        """
        found = self._newest(load_tensors, before_nimg, quiet)
        return None if found is None else found[1]

    def newest_nimg(self, before_nimg: int | None = None, quiet: bool = False) -> int:
        """Images seen at the state that `newest` finds, 0 without one; nothing is kept in memory."""
        found = self._newest(verify_tensors, before_nimg, quiet)
        return 0 if found is None else found[0]

    def paths(self, before_nimg: int | None = None) -> dict[int, Path]:
        """Every state by its images seen, whole or not, the newest first.

        Raises:
            OSError: the folder is there and cannot be listed.
        """
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return {}
        matches = filter(None, map(STATE_NAME.fullmatch, names))
        found = {int(match[1]): self.folder / match[0] for match in matches}
        return {n: found[n] for n in sorted(found, reverse=True) if before_nimg is None or n < before_nimg}

    def sweep(self) -> None:
        """Remove what processes that are gone were writing in the folder."""
        Folder.at(self.folder).sweep()

    def _on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, which stays: taking it anew costs ten times the copy. GPUs get pinned memory."""
        host = {}
        for name, tensor in tensors.items():
            kept = self._host.get(name)
            if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host[name] = kept.copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        self._host = host
        return host

    def _newest(self, read: Callable[[Path], T], before_nimg: int | None, quiet: bool) -> tuple[int, T] | None:
        torn: dict[Path, str] = {}
        found = None
        for nimg, path in self._listed(before_nimg).items():
            try:
                found = nimg, _patiently(partial(read, path), path, self.waits_s)
                break
            except CorruptFile as error:
                torn[path] = error.reason
                self._torn.add(nimg)
        used = "training begins anew" if found is None else f"{state_path(self.folder, found[0]).name} is used instead"
        for path, reason in torn.items():
            if not quiet:
                logger.warning("%s is torn (%s); %s", path, reason, used)
        return found

    def _listed(self, before_nimg: int | None) -> dict[int, Path]:
        try:
            return _patiently(partial(self.paths, before_nimg), self.folder, self.waits_s)
        except OSError as error:
            raise SimsError(f"{self.folder} cannot be listed ({error.strerror}); make it accessible") from None

    def _write(
        self, nimg: int, tensors: Mapping[str, Tensor], card: Mapping[str, Any], keep_also: Collection[int]
    ) -> None:
        path = state_path(self.folder, nimg)
        try:
            save_patiently(path, tensors, card, self.waits_s)
        except SimsError as error:
            self._error = error
            return
        except Exception as error:  # in a thread of its own it would be lost
            self._error = SimsError(f"{path} cannot be written ({error!r}); {INTACT}look into the error and run again")
            return
        self._torn.discard(nimg)
        try:
            self._prune(nimg, keep_also)
        except (OSError, SimsError) as error:  # the next save tries again
            logger.warning("older states in %s are kept (%s)", self.folder, error)

    def _prune(self, nimg: int, keep_also: Collection[int]) -> None:
        """Remove older states that nothing needs, those known to be torn, and what a lost writer left."""
        referred = read_manifest(self.folder).get("files", {}) if (self.folder / MANIFEST).is_file() else {}
        paths = self.paths()
        whole = [n for n in paths if n <= nimg and n not in self._torn]
        kept = {*whole[: self.keep], *keep_also}
        for n, path in paths.items():
            if (n <= nimg or n in self._torn) and n not in kept and path.name not in referred:
                path.unlink(missing_ok=True)
        for beside in self.folder.glob(BESIDE):  # this is the one writer, and it is done
            beside.unlink(missing_ok=True)


def _patiently(action: Callable[[], T], path: Path, waits_s: Sequence[float]) -> T:
    """Do what needs the storage; while that is away, again after each wait, with one warning for all."""
    for attempt, wait_s in enumerate(waits_s):
        try:
            return action()
        except (OSError, UnreadableFile) as error:
            if getattr(error, "errno", None) in FULL:
                raise
            if attempt == 0:
                reason = getattr(error, "strerror", None) or error
                logger.warning("%s: the storage is away (%s); retried for %g s", path, reason, sum(waits_s))
        time.sleep(wait_s)
    return action()
