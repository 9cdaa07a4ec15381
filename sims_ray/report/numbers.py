"""Numbers and settings as a reader wants them: on the page in words, in the CSVs exactly."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"  # stands where there is no value


def number(value: float | None, digits: int = 4) -> str:
    """A number to `digits` significant digits, thousands separated; a dash for none."""
    if value is None:
        return NONE
    if not math.isfinite(value) or value == 0:
        return f"{value:g}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def short(value: float | None) -> str:
    """A setting such as a strength, without trailing zeros; a dash for none."""
    return NONE if value is None else f"{value:.12g}".replace("-", MINUS)


def count(value: float | None) -> str:
    """A number of things, thousands separated; a dash for none."""
    return NONE if value is None else f"{value:,.12g}"


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, as differences are written."""
    return ("+" if value > 0 else "") + number(value, digits)


def percent(share: float | None) -> str:
    """A signed percentage, whole from 10 % on; a dash for none."""
    if share is None:
        return NONE
    return f"{share:+.{0 if abs(share) >= 0.0995 else 1}%}".replace("-", MINUS)


def seconds(duration_s: float) -> str:
    """A duration in the unit a person would use."""
    if duration_s < 120:
        return f"{duration_s:.1f} s"
    return f"{duration_s / 60:.1f} min" if duration_s < 7200 else f"{duration_s / 3600:.1f} h"


def finite(value: float | None) -> bool:
    """Whether there is a value and it is a number."""
    return value is not None and math.isfinite(value)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """CSV whose numbers read back exactly; none is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
