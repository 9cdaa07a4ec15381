"""WebDataset: tars in which the members of one sample lie together and share all of their name up to a dot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sims_ray.data.archives import Member, tar_members
from sims_ray.data.entries import EXTENSIONS, Entry, Source, check_label, shown
from sims_ray.data.samples import NO_LABEL
from sims_ray.errors import SimsError

WHOLE = re.compile(r"-?[0-9]{1,18}")
LABEL_BYTES = 1 << 20  # of a .cls or .json


def webdataset_source(path: Path, tars: Sequence[Path]) -> Source:
    """The samples of tars: one image each, and a label in `.cls` (a number) or in `.json` (under `label`) or none.

    Other members of a sample are passed over. The id is the running number over all tars.
    """
    return Source(path, lambda: _entries(tars), None)


def _entries(tars: Sequence[Path]) -> Iterator[Entry]:
    running = 0
    for tar in tars:
        seen: set[str] = set()
        named = (member for member in tar_members(tar) if _split(member)[1])
        for key, members in groupby(named, lambda member: _split(member)[0]):
            if key in seen:
                raise SimsError(f"{tar}: {shown(key)} comes in two places; keep the members of a sample together")
            seen.add(key)
            yield _sample(tar, key, running, members)
            running += 1


def _sample(tar: Path, key: str, running: int, members: Iterator[Member]) -> Entry:
    where, image = f"{tar}: {shown(key)}", None
    labels: dict[str, int] = {}
    for member in members:
        kind = _split(member)[1]
        if kind in EXTENSIONS and image is not None:
            raise SimsError(f"{member.where} is a second image of one sample; give each its own name up to the dot")
        if kind in EXTENSIONS:
            where, image = member.where, member.read()
        elif kind in (".cls", ".json"):
            labels[kind] = _label(member, kind)
    if image is None:
        raise SimsError(f"{where} has no image among its members; add one ({', '.join(sorted(EXTENSIONS))})")
    return Entry(running, labels.get(".cls", labels.get(".json", NO_LABEL)), where, image)


def _split(member: Member) -> tuple[str, str]:
    """Name up to the first dot of its last part, and the rest in lower case."""
    folder, slash, base = member.name.rpartition("/")
    key, dot, rest = base.partition(".")
    return f"{folder}{slash}{key}", f"{dot}{rest}".lower()


def _label(member: Member, kind: str) -> int:
    content = member.read()
    if len(content) > LABEL_BYTES:
        raise SimsError(f"{member.where} has {len(content)} bytes; a label takes a few")
    if kind == ".cls":
        text = content.decode(errors="replace").strip()
        return check_label(int(text) if WHOLE.fullmatch(text) else text, member.where)
    try:
        facts: Any = json.loads(content)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise SimsError(f'{member.where} is no JSON object; write a label as {{"label": 3}}')
    value = facts.get("label")
    return NO_LABEL if value is None else check_label(value, member.where)
