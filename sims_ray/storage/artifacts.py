"""Artifacts: directories named by a fingerprint whose manifest, written last, is the commit.

Everything in the directory before the manifest is work in progress that the stage may pick up again.
A committed artifact is never overwritten.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sims_ray.errors import SimsError
from sims_ray.storage.beside import atomic_path
from sims_ray.storage.folders import Folder

MANIFEST = "manifest.json"
FORMAT = 1  # raise when a stage's mathematics changes, so that old artifacts are not taken for new ones
FINGERPRINT_CHARS = 20  # of the SHA-256 in directory names
VERSIONED = ("sims_ray", "torch", "numpy", "pyarrow", "ray")


def fingerprint(stage: str, settings: Mapping[str, Any], parents: Sequence[str]) -> str:
    """SHA-256 over a stage's name, the settings that can change its content, and its parents' fingerprints."""
    identity = {"format": FORMAT, "stage": stage, "settings": settings, "parents": list(parents)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented and with sorted keys."""
    with atomic_path(path) as beside:
        beside.write_text(to_json(value))


@dataclass(frozen=True)
class Artifact:
    """One stage's output, complete or in the making.

    Attributes:
        path: its directory.
        stage: name of the stage.
        settings: what its content depends on.
        parents: fingerprints of its inputs.
    """

    path: Path
    stage: str
    settings: Mapping[str, Any]
    parents: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over stage, settings and parents."""
        return fingerprint(self.stage, self.settings, self.parents)

    @property
    def complete(self) -> bool:
        """Whether the manifest is there and every file it names has its size.

        Raises:
            SimsError: a committed file is missing or has another size.
        """
        if not (self.path / MANIFEST).is_file():
            return False
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                found = "missing" if size is None else f"{size} bytes"
                raise SimsError(
                    f"{file} is {found} but its manifest says {entry['bytes']} bytes; "
                    f"delete the folder {self.path} and run again to remake it"
                )
        return True

    @property
    def manifest(self) -> dict[str, Any]:
        """The committed manifest.

        Raises:
            SimsError: the artifact is not complete.
        """
        return read_manifest(self.path)

    @property
    def result(self) -> dict[str, Any]:
        """What the stage computed, as stored in the manifest."""
        result: dict[str, Any] = self.manifest["result"]
        return result

    def commit(self, files: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any] | None = None) -> None:
        """Write the manifest: `files` maps names inside the directory to extra facts such as `rows`."""
        entries = {
            name: {"sha256": sha256_file(self.path / name), **facts, "bytes": (self.path / name).stat().st_size}
            for name, facts in files.items()
        }
        manifest = new_manifest(self.stage, self.settings, self.parents, entries, result or {})
        write_json(self.path / MANIFEST, manifest)


def adopt(source: Path, artifact: Artifact, name: str) -> None:
    """Commit a copy of the user's own file as an artifact with one file, `name`."""
    with atomic_path(artifact.path / name) as beside:
        shutil.copyfile(source, beside)
    artifact.commit({name: {}}, {"source": source.name})


class Store:
    """The folder that holds a run's artifacts.

    Args:
        root: folder on storage that every worker sees.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def artifact(self, stage: str, settings: Mapping[str, Any], parents: Sequence[Artifact | str] = ()) -> Artifact:
        """The artifact of a stage with these settings and parents; its directory need not exist yet."""
        prints = tuple(p if isinstance(p, str) else p.fingerprint for p in parents)
        plain = json.loads(json.dumps(settings))  # tuples become lists, so equal settings compare equal
        name = f"{stage}-{fingerprint(stage, plain, prints)[:FINGERPRINT_CHARS]}"
        return Artifact(self.root / name, stage, plain, prints)


def new_manifest(
    stage: str,
    settings: Mapping[str, Any],
    parents: Sequence[str],
    files: Mapping[str, Mapping[str, Any]],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """What commits a folder: what it is, and for each file its `sha256`, its `bytes` and further facts."""
    return {
        "format": FORMAT,
        "stage": stage,
        "fingerprint": fingerprint(stage, settings, parents),
        "settings": dict(settings),
        "parents": list(parents),
        "files": {name: dict(facts) for name, facts in sorted(files.items())},
        "result": dict(result),
        "versions": {name: _version(name) for name in VERSIONED},
    }


def to_json(value: Any) -> str:
    """JSON, indented and with sorted keys."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path | str | Folder) -> dict[str, Any]:
    """Read the manifest of a committed folder.

    Raises:
        SimsError: there is none, or it is not JSON.
    """
    folder = Folder.at(folder)
    try:
        manifest = json.loads(folder.read(MANIFEST).decode())
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
    except (FileNotFoundError, NotADirectoryError):
        raise SimsError(f"{folder} has no {MANIFEST}: it is not a finished artifact; make it first") from None
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        where = f"{folder}/{MANIFEST}"
        raise SimsError(f"{where} is not a manifest ({error}); delete {folder} and make it again") from None
    return manifest


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
