"""Synthetic sets: one Parquet file per seed range, each a pure function of model, settings and seeds.

A set is named by what makes its images, not by how many there are: it can be extended, and its prefixes are the
smaller sets. A file's name is its seed range. The manifest, written last, is the commit; files that it does not
list yet count as well once they are checked, whoever made them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sims_ray.data.samples import Samples, read_metadata, read_samples
from sims_ray.data.table import table_result
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST, fingerprint, new_manifest, to_json
from sims_ray.storage.folders import Folder

STAGE = "synthesize"
SHARD = re.compile(r"^seeds-(\d{12})-(\d{12})\.parquet$")
CHECK_THREADS = 8
CHECK_BYTES = 512 << 20  # of files that are looked at at once
COMMITS = 3


class OtherSetError(SimsError):
    """A folder holds images that other settings or another model made."""


class TornFileError(SimsError):
    """A file is there and can be read, but is not what a worker left."""


def shard_name(seeds: range) -> str:
    """File name of a seed range; names sort as the seeds do."""
    return f"seeds-{seeds.start:012d}-{seeds.stop - 1:012d}.parquet"


def shard_seeds(name: str) -> range | None:
    """Seed range of a file name; None for another kind of file."""
    match = SHARD.match(name)
    return range(int(match[1]), int(match[2]) + 1) if match else None


def shard_facts(samples: Samples, data: Any) -> dict[str, Any]:
    """What the manifest says of one file: digest and size of its bytes, and what is in it."""
    facts = table_result(samples.images.shape[1:], samples.labels, len(samples))
    digest = hashlib.sha256(data).hexdigest()
    return {"sha256": digest, "bytes": len(data), **{key: facts[key] for key in ("rows", "num_classes", "unlabelled")}}


@dataclass(frozen=True)
class Survey:
    """What lies in a set's folder.

    Attributes:
        kept: facts of the files that count, by name.
        torn: for each file that does not, what is wrong with it.
        left_over: names of files whose seeds others of `kept` hold.
    """

    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    torn: dict[str, str] = field(default_factory=dict)
    left_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class SyntheticSet:
    """One synthetic set, in the making or committed.

    Attributes:
        folder: where it lies.
        settings: what an image depends on beside its seed and the parents: sampler, labels, guidance, `first_seed`.
        parents: fingerprints of what it is sampled from.
        shape: (C, H, W) of the images.
        kind: 'image' or 'latent'.
        facts: further entries of the manifest's result.
    """

    folder: Folder
    settings: Mapping[str, Any]
    parents: tuple[str, ...]
    shape: tuple[int, int, int]
    kind: str = "image"
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what makes the images; the number of images is not in it."""
        return fingerprint(STAGE, self.settings, self.parents)

    @property
    def first_seed(self) -> int:
        """Seed of the first row."""
        return int(self.settings["first_seed"])

    def complete(self, n: int) -> bool:
        """Whether a manifest commits at least `n` images and every file it lists has its size.

        Raises:
            SimsError: the folder holds another set.
        """
        listed = self._manifest()
        if listed is None or sum(facts["rows"] for facts in listed.values()) < n:
            return False
        sizes = self.folder.files()
        return all(sizes.get(name) == facts["bytes"] for name, facts in listed.items())

    def survey(self) -> Survey:
        """Look at every file: those of the manifest by their size, the others by all of their content.

        Raises:
            SimsError: the folder holds another set.
        """
        sizes, listed = self.folder.files(), self._manifest() or {}
        kept = {name: facts for name, facts in listed.items() if sizes.get(name) == facts["bytes"]}
        torn = {
            name: f"is {_bytes(sizes.get(name))}, its manifest says {facts['bytes']:,} bytes"
            for name, facts in listed.items()
            if name not in kept
        }
        loose = [name for name in sizes if shard_seeds(name) is not None and name not in listed]
        whole: dict[str, dict[str, Any]] = {}
        largest = max((sizes[name] for name in loose), default=0)
        with ThreadPoolExecutor(max(1, min(CHECK_THREADS, CHECK_BYTES // max(largest, 1)))) as pool:
            for name, found in zip(loose, pool.map(self._checked, loose), strict=True):
                if isinstance(found, str):
                    torn[name] = found
                else:
                    whole[name] = found
        added = _disjoint(kept, whole)
        left_over = tuple(name for name in whole if name not in added)
        return Survey(dict(sorted({**kept, **{name: whole[name] for name in added}}.items())), torn, left_over)

    def check(self, name: str) -> dict[str, Any]:
        """Facts of a file that is there, after its whole content was looked at.

        Raises:
            TornFileError: it is torn, or its rows are not those of its name.
            OtherSetError: it is of another set.
            FileNotFoundError: it is absent.
        """
        data, where = self.folder.read(name), f"{self.folder}/{name}"
        seeds = shard_seeds(name) or range(0)
        try:
            found = read_metadata(io.BytesIO(data), where).get("fingerprint")
            samples = read_samples(io.BytesIO(data), where=where)
        except SimsError as error:
            raise TornFileError(str(error)) from None
        if found != self.fingerprint:
            raise OtherSetError(f"{where} was made with other settings or another model; choose another folder")
        if not np.array_equal(samples.ids, np.arange(seeds.start, seeds.stop)):
            raise TornFileError(f"{where} holds other seeds than its name says; remove it")
        return shard_facts(samples, data)

    def missing(self, kept: Iterable[str], n: int, shard_nimg: int) -> list[range]:
        """The seed ranges that are still to be made for `n` images, cut at multiples of `shard_nimg`."""
        first, stop = self.first_seed, self.first_seed + n
        covered = sorted((seeds for name in kept if (seeds := shard_seeds(name))), key=lambda seeds: seeds.start)
        gaps, at = [], first
        for seeds in [*covered, range(stop, stop)]:
            gaps.append(range(at, min(seeds.start, stop)))
            at = max(at, seeds.stop)
        return [part for gap in gaps for part in _cut(gap, first, shard_nimg)]

    def commit(self, kept: Mapping[str, Mapping[str, Any]]) -> None:
        """List files in the manifest: these, as far as they are there, and those that are listed there already.

        Raises:
            SimsError: the seeds of the files do not follow each other from the first one.
        """
        for _ in range(COMMITS):
            files = self._listable(kept)
            result = {
                "rows": sum(facts["rows"] for facts in files.values()),
                "shape": list(self.shape),
                "kind": self.kind,
                "num_classes": max(facts["num_classes"] for facts in files.values()),
                "unlabelled": sum(facts["unlabelled"] for facts in files.values()),
                **self.facts,
            }
            manifest = new_manifest(STAGE, self.settings, self.parents, files, result)
            if self._listable(kept) == files:  # or another driver has committed more while this one looked
                break
        self.folder.put(MANIFEST, to_json(manifest).encode())

    def _listable(self, kept: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The files that a manifest may list now: those that one lists already go first."""
        sizes, listed = self.folder.files(), self._manifest() or {}
        files = {name: dict(facts) for name, facts in listed.items() if sizes.get(name) == facts["bytes"]}
        ours = {name: dict(facts) for name, facts in kept.items() if sizes.get(name) == facts["bytes"]}
        files |= {name: facts for name, facts in ours.items() if name in files}  # made anew, elsewhere perhaps
        files = _in_a_row({**files, **{name: ours[name] for name in _disjoint(files, ours)}}, self.first_seed)
        if not files:
            raise SimsError(f"{self.folder} holds no images from seed {self.first_seed} on; run again to make them")
        return files

    def _manifest(self) -> dict[str, dict[str, Any]] | None:
        """The files of the manifest; None without one."""
        try:
            text = self.folder.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            manifest = json.loads(text)
            found = manifest["fingerprint"]
            files = {str(name): dict(facts) for name, facts in manifest["files"].items()}
            whole = all(isinstance(facts[key], int) for facts in files.values() for key in ("bytes", "rows"))
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise SimsError(
                f"{self.folder}/{MANIFEST} is torn; remove that file alone and run again, whole files are kept"
            )
        if found != self.fingerprint:
            raise OtherSetError(
                f"{self.folder} holds what {manifest.get('stage')} made with other settings or another model; "
                f"choose another folder"
            )
        return files

    def _checked(self, name: str) -> dict[str, Any] | str:
        try:
            return self.check(name)
        except FileNotFoundError:
            return "was removed"
        except TornFileError as error:  # not what the storage fails with: such a file may be a good one
            return str(error)


def _disjoint(files: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of `others` whose seeds neither `files`, which are disjoint, nor one another hold."""
    taken = sorted((seeds.start, seeds.stop) for name in files if (seeds := shard_seeds(name)))
    starts = [start for start, _ in taken]
    accepted, at = [], 0
    for name in sorted(others):
        seeds = shard_seeds(name)
        if seeds is None or seeds.start < at:
            continue
        before = bisect_left(starts, seeds.stop)
        if before and taken[before - 1][1] > seeds.start:
            continue
        accepted.append(name)
        at = seeds.stop
    return accepted


def _cut(gap: range, first: int, shard_nimg: int) -> list[range]:
    """A gap in pieces that end at multiples of `shard_nimg` from the first seed of the set."""
    pieces, at = [], gap.start
    while at < gap.stop:
        stop = min(first + ((at - first) // shard_nimg + 1) * shard_nimg, gap.stop)
        pieces.append(range(at, stop))
        at = stop
    return pieces


def _in_a_row(files: Mapping[str, dict[str, Any]], first: int) -> dict[str, dict[str, Any]]:
    """The files whose seeds follow each other from the first one."""
    run: dict[str, dict[str, Any]] = {}
    at = first
    for name in sorted(files):
        seeds = shard_seeds(name)
        if seeds is None or seeds.start != at:
            break
        run[name], at = files[name], seeds.stop
    return run


def _bytes(size: int | None) -> str:
    return "missing" if size is None else f"{size:,} bytes"
