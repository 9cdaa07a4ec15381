"""New tables and folders that appear complete or not at all, on a disk or in an object store."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sims_ray.data.samples import Samples, encode_samples
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST, new_manifest, to_json
from sims_ray.storage.beside import hidden_path
from sims_ray.storage.folders import Folder, is_uri

OTHER_NAME = "choose another name or remove it first"


def check_new(out: Path | str) -> Folder:
    """Refuse an output that holds something or cannot be written to, before any work.

    Raises:
        SimsError: it is a file, a folder with something in it, or a store that cannot be written to.
    """
    folder = Folder.at(out)
    if folder.local is not None:
        if folder.local.exists() and not (folder.local.is_dir() and not any(folder.local.iterdir())):
            raise SimsError(f"{folder} exists and is not an empty folder; {OTHER_NAME}")
        return folder
    if held := folder.files():
        raise SimsError(f"{folder} holds {next(iter(held))}; {OTHER_NAME}")
    folder.check_writable()
    return folder


def content_fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Fingerprint of files by their SHA-256 in the order of their names, whatever they came from."""
    digests = "".join(facts["sha256"] for _, facts in sorted(files.items()))
    return hashlib.sha256(digests.encode()).hexdigest()


@dataclass
class NewTable:
    """A table in the making; make one with `new_table`.

    Attributes:
        folder: where its files are put.
        files: what the manifest will say of each.
    """

    folder: Folder
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, samples: Samples, metadata: Mapping[str, Any]) -> None:
        """Write one Parquet file; `metadata` lands in it under the key `sims_ray` as JSON."""
        content = memoryview(encode_samples(samples, metadata))
        digest = hashlib.sha256(content).hexdigest()
        self.files[name] = {"sha256": digest, "bytes": content.nbytes, "rows": len(samples)}
        self.folder.put(name, content)

    def copy(self, name: str, source: Folder, facts: Mapping[str, Any]) -> None:
        """Take over a file of another table byte for byte, with what its manifest says of it.

        Raises:
            SimsError: it is missing there, or not what the manifest says.
        """
        self.files[name] = dict(facts)
        self.folder.copy(name, source, facts["sha256"])

    def commit(
        self,
        stage: str,
        settings: Mapping[str, Any],
        result: Mapping[str, Any],
        parents: Sequence[str] = (),
        by_content: bool = True,
    ) -> str:
        """Write the manifest; returns the fingerprint.

        Args:
            stage: what made the table.
            settings: how.
            result: the facts of `table_result` and others.
            parents: fingerprints of what it was made from.
            by_content: the fingerprint is that of the files, so that origin and settings do not matter.

        Raises:
            SimsError: another process has made a table there meanwhile.
        """
        manifest = new_manifest(stage, settings, parents, self.files, result)
        if by_content:
            manifest["fingerprint"] = content_fingerprint(self.files)
        if not self.folder.create(MANIFEST, to_json(manifest).encode()):
            raise SimsError(f"{self.folder} holds a table by now; choose another name")
        return str(manifest["fingerprint"])


@contextmanager
def new_table(out: Path | str) -> Iterator[NewTable]:
    """A table to fill and commit inside the block; on failure nothing of it is left.

    On a disk the folder appears as a whole. In an object store the manifest, written last, makes it a table.

    Raises:
        SimsError: `out` holds something or cannot be written to.
    """
    folder = check_new(out)
    if folder.local is not None:
        with atomic_folder(folder.local) as path:
            yield NewTable(Folder.at(path))
        return
    table = NewTable(folder)
    try:
        yield table
    except BaseException:
        with suppress(SimsError):  # what stopped the work says more than what stops the tidying
            if folder.size(MANIFEST) is None:  # or another process owns the files by now
                for name in table.files:
                    folder.delete(name)
        raise


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` to fill; renamed onto it on success, removed on failure.

    What a killed process left beside `out` goes first.

    Raises:
        SimsError: it cannot be made, or `out` holds something by the time of the renaming.
    """
    try:
        beside = hidden_path(out)
        beside.mkdir()
    except OSError as error:
        raise SimsError(f"{out} cannot be made ({error.strerror}); choose a folder you can write to") from None
    Folder.at(out.parent).sweep()
    try:
        yield beside
        try:
            os.replace(beside, out)
        except OSError as error:
            raise SimsError(
                f"{out} cannot be made ({error.strerror}); choose another name or remove it first"
            ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_new_local(out: Path | str, what: str) -> Path:
    """The path of an output that is to be made on a disk; `what` is for messages.

    Raises:
        SimsError: it is in an object store, or exists.
    """
    if is_uri(out):
        raise SimsError(f"{what} cannot be written to {Folder.at(out)}; give a path on a disk and upload it afterwards")
    folder = check_new(out)
    return Path(folder.location)
