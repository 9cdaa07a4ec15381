"""The command line, called in this process."""

from pathlib import Path

import pytest

from sims_ray.cli import main


def sims(*words: str | Path) -> int:
    """Run `sims` with these words; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)
