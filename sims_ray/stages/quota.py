"""The quota stage: sampling goes on until a classifier has found images for given shares of its attributes.

The candidates are an ordinary synthetic set with a column `attribute`, extended in rounds; the chosen rows are a table
of their own, one file per range of slots. Both are pure functions of model, settings, classifier and shares: a larger
set keeps what a smaller one has, whatever the rounds were.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sims_ray.config import SEED_LIMIT, ComputeSettings
from sims_ray.data.quotas import PATIENCE_NIMG, candidates_needed, gather, select
from sims_ray.data.samples import Samples, encode_samples, read_metadata, read_samples
from sims_ray.data.synthetic import STAGE, shard_facts
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.stages.progress import Progress
from sims_ray.stages.synthesize import SynthesisJob, synthesize
from sims_ray.storage.artifacts import FINGERPRINT_CHARS, MANIFEST, fingerprint, new_manifest, read_manifest, to_json
from sims_ray.storage.attributes import AttributeClassifier, AttributeSource
from sims_ray.storage.folders import Folder

logger = logging.getLogger("sims_ray")

QUOTA = "quota"
PART_SLOTS = 8192  # rows per file; never another number, or larger sets would not keep the files of smaller ones
PART = re.compile(r"^slots-\d{12}-\d{12}\.parquet$")


@dataclass(frozen=True)
class QuotaJob:
    """One set with given shares of attributes to make.

    Attributes:
        candidates: the set it is chosen from, with attributes; its `n` does not matter.
        shares: share of each attribute in the chosen rows.
        n: number of rows.
        folder: where they land.
        most_nimg: candidates at most; None for all seeds there are.
        patience_nimg: candidates after which an attribute that is needed should have appeared.

    Raises:
        SimsError: the candidates have no attributes.
    """

    candidates: SynthesisJob
    shares: Mapping[int, float]
    n: int
    folder: Folder
    most_nimg: int | None = None
    patience_nimg: int = PATIENCE_NIMG

    def __post_init__(self) -> None:
        if self.candidates.attributes is None or "attributes" not in self.candidates.set.settings:
            raise SimsError(f"the candidates in {self.candidates.set.folder} have no attributes; name a classifier")

    @classmethod
    def under(
        cls, root: str | Path, synthesis: SynthesisJob, source: AttributeSource, shares: Mapping[int, float], n: int
    ) -> QuotaJob:
        """The job that chooses from what `synthesis` would sample, in folders named by fingerprints.

        Args:
            root: folder or URI under which the candidates and the chosen rows land.
            synthesis: model, settings and first seed; its folder and its `n` do not matter.
            source: classifier of the attributes.
            shares: share of each attribute in the chosen rows.
            n: number of rows.

        Raises:
            SimsError: there is no classifier.
        """
        target = replace(synthesis.set, settings={**synthesis.set.settings, "attributes": source.identity()})
        target = replace(target, folder=_folder(root, STAGE, target.fingerprint))
        job = cls(replace(synthesis, set=target, attributes=source), shares, n, target.folder)
        return replace(job, folder=_folder(root, QUOTA, job.fingerprint))

    @property
    def settings(self) -> dict[str, Any]:
        """What the choice depends on beside the parents, as a manifest gives it back."""
        shares = {str(attribute): float(self.shares[attribute]) for attribute in sorted(self.shares)}
        groups = self.candidates.set.settings["attributes"]["groups"]
        return {"shares": {attribute: share for attribute, share in shares.items() if share}, "groups": groups}

    @property
    def parents(self) -> tuple[str, str]:
        """Fingerprint of the candidates, and SHA-256 of the classifier's file."""
        return self.candidates.fingerprint, str(self.candidates.set.settings["attributes"]["classifier"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the rows depend on; their number is not in it."""
        return fingerprint(QUOTA, self.settings, self.parents)

    @property
    def complete(self) -> bool:
        """Whether at least `n` rows are committed and every file of theirs has its size.

        Raises:
            SimsError: the folder holds another set.
        """
        listed, sizes = self.listed(), self.folder.files()
        return _rows(listed) >= self.n and all(sizes.get(name) == facts["bytes"] for name, facts in listed.items())

    def listed(self) -> dict[str, dict[str, Any]]:
        """Facts of the files that are committed, by name; none without a manifest.

        Raises:
            SimsError: the folder holds another set.
        """
        if self.folder.size(MANIFEST) is None:
            return {}
        manifest = read_manifest(self.folder)
        if manifest.get("fingerprint") != self.fingerprint:
            raise SimsError(
                f"{self.folder} holds what {manifest.get('stage')} made with other settings; choose another folder"
            )
        files: dict[str, dict[str, Any]] = manifest["files"]
        return files

    @property
    def limit_nimg(self) -> int:
        """Candidates at most: as set, and no more than there are seeds."""
        seeds = SEED_LIMIT - self.candidates.set.first_seed
        return seeds if self.most_nimg is None else min(self.most_nimg, seeds)

    def parts(self) -> list[range]:
        """Slots of each file."""
        return [range(start, min(start + PART_SLOTS, self.n)) for start in range(0, self.n, PART_SLOTS)]


def synthesize_quota(job: QuotaJob, compute: ComputeSettings, label: str = "quota") -> None:
    """Sample candidates until they fill the quotas, write the chosen rows, commit.

    Raises:
        SimsError: the shares or the classifier do not fit, an attribute does not come or not often enough, or a
            folder holds another set.
    """
    if job.complete:
        return
    _check(job)
    job.folder.check_writable()
    job.folder.sweep()
    listed = job.listed()
    job = replace(job, n=max(job.n, _rows(listed)))
    rows = _choose(job, compute, label)
    table, sizes = SampleTable(job.candidates.set.folder), job.folder.files()
    kept = {name: facts for name, facts in listed.items() if sizes.get(name) == facts["bytes"]}
    progress = Progress(label, job.n)
    files: dict[str, dict[str, Any]] = {}
    for slots in job.parts():
        name, part = _part_name(slots), rows[slots.start : slots.stop]
        facts = kept.get(name) or (_whole(job, name, part) if name in sizes else None)
        files[name] = facts or _make(job, name, gather(table, part))
        progress.add(len(slots))
    _commit(job, files)


def _check(job: QuotaJob) -> None:
    """Refuse before any sampling what cannot end well."""
    candidates = job.candidates.set
    select(np.array([], np.int32), job.shares, 0)  # raises for shares that are none
    if candidates.kind != "image":
        raise SimsError(f"attributes are seen in images and {candidates.folder} is to hold latents; decode them first")
    if job.candidates.attributes is not None:
        classifier = AttributeClassifier.load(job.candidates.attributes)
        classifier.check(candidates.shape)
        if unknown := sorted({a for a, share in job.shares.items() if share} - set(classifier.attributes)):
            raise SimsError(f"attribute {unknown[0]} has a share; the classifier sees only {classifier.attributes}")


def _choose(job: QuotaJob, compute: ComputeSettings, label: str) -> NDArray[np.int64]:
    """Rows of the candidates that fill the slots; more of them are sampled until there are enough."""
    while True:
        attributes = _attributes(job, compute)
        seen = len(attributes)
        found = dict(zip(*(part.tolist() for part in np.unique(attributes, return_counts=True)), strict=True))
        tally = ", ".join(f"{count:,} of attribute {attribute}" for attribute, count in found.items()) or "none"
        wanted = seen + candidates_needed(found, seen, job.shares, job.n, job.patience_nimg)
        if wanted == seen:
            logger.info("%s: %s in %s candidates suffice for %s rows", label, tally, f"{seen:,}", f"{job.n:,}")
            return select(attributes, job.shares, job.n).rows
        if wanted > job.limit_nimg:
            raise SimsError(
                f"{job.n:,} rows with shares {dict(job.shares)} need about {wanted:,} candidates and "
                f"{job.limit_nimg:,} are allowed ({tally} in {seen:,}); ask for fewer rows"
            )
        logger.info("%s: %s in %s candidates, going on to %s", label, tally, f"{seen:,}", f"{wanted:,}")
        synthesize([replace(job.candidates, n=_whole_files(job, wanted))], compute, f"{label}: candidates")


def _whole_files(job: QuotaJob, nimg: int) -> int:
    """The number of candidates, rounded up to whole files once there is more than one."""
    size = job.candidates.shard_nimg
    if size is None or nimg <= size:
        return nimg
    return min(-(-nimg // size) * size, job.limit_nimg)


def _attributes(job: QuotaJob, compute: ComputeSettings) -> NDArray[np.int32]:
    """What the classifier saw in the committed candidates, in the order of their seeds: int32 [M]."""
    folder = job.candidates.set.folder
    if folder.size(MANIFEST) is None:
        return np.array([], np.int32)
    synthesize([replace(job.candidates, n=len(SampleTable(folder)))], compute)  # remakes what was lost since
    table = SampleTable(folder)
    parts = []
    for name in table.file_rows:
        with folder.open(name) as file:
            parts.append(pq.ParquetFile(file).read(columns=["attribute"])["attribute"].to_numpy())
    return np.concatenate(parts)


def _make(job: QuotaJob, name: str, samples: Samples) -> dict[str, Any]:
    """Leave a file; returns its facts."""
    metadata = {"fingerprint": job.fingerprint, "settings": job.settings, "parents": list(job.parents)}
    data = memoryview(encode_samples(samples, metadata))
    job.folder.put(name, data)
    return _facts(samples, data)


def _whole(job: QuotaJob, name: str, rows: NDArray[np.int64]) -> dict[str, Any] | None:
    """Facts of a file that is not committed but holds these rows of this set; None if it does not."""
    data, where = job.folder.read(name), f"{job.folder}/{name}"
    try:
        samples = read_samples(io.BytesIO(data), where=where)
        ours = read_metadata(io.BytesIO(data), where).get("fingerprint") == job.fingerprint
    except SimsError as error:
        logger.warning("%s is made again: %s", name, error)
        return None
    seeds = job.candidates.set.first_seed + rows
    return _facts(samples, data) if ours and np.array_equal(samples.ids, seeds) else None


def _facts(samples: Samples, data: Any) -> dict[str, Any]:
    counts = Counter(np.asarray(samples.attributes).tolist())
    return {**shard_facts(samples, data), "attributes": {str(a): count for a, count in sorted(counts.items())}}


def _commit(job: QuotaJob, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, unless another driver has committed as much, and remove what larger files hold too."""
    if job.complete:
        return
    counts: Counter[str] = Counter()
    for facts in files.values():
        counts.update(facts["attributes"])
    result = {
        "rows": _rows(files),
        "shape": list(job.candidates.set.shape),
        "kind": job.candidates.set.kind,
        "num_classes": max(facts["num_classes"] for facts in files.values()),
        "unlabelled": sum(facts["unlabelled"] for facts in files.values()),
        "attributes": dict(counts),
    }
    job.folder.put(MANIFEST, to_json(new_manifest(QUOTA, job.settings, job.parents, files, result)).encode())
    last = max(files)
    for name in job.folder.files():
        if PART.match(name) and name < last and name not in files:  # the last file of a smaller set
            job.folder.delete(name)


def _rows(files: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(facts["rows"] for facts in files.values())


def _part_name(slots: range) -> str:
    return f"slots-{slots.start:012d}-{slots.stop - 1:012d}.parquet"


def _folder(root: str | Path, stage: str, name: str) -> Folder:
    return Folder.at(root).child(f"{stage}-{name[:FINGERPRINT_CHARS]}")
