"""Progress lines: images done, images per second, time left; rare enough for a log file."""

import logging
import time
from datetime import timedelta

logger = logging.getLogger("sims_ray")

INTERVAL_S = 10.0


class Progress:
    """Logs one line at most every few seconds, and one at the end.

    Args:
        label: what is being done.
        total_nimg: images in all.
        done_nimg: images that an earlier run had done already.
    """

    def __init__(self, label: str, total_nimg: int, done_nimg: int = 0) -> None:
        self.label, self.total_nimg = label, total_nimg
        self.done_nimg = done_nimg
        self._first: tuple[int, float] | None = None  # the speed is counted from here, without the start-up
        self._last_s = time.monotonic()
        if done_nimg:
            logger.info("%s: going on from %s of %s images", label, f"{done_nimg:,}", f"{total_nimg:,}")

    def update(self, done_nimg: int, note: str = "", always: bool = False) -> None:
        """Say that `done_nimg` images are done in all; `always` logs a line however recent the last one is."""
        self.done_nimg = done_nimg
        now = time.monotonic()
        if self._first is None:
            self._first = (done_nimg, now)
        if now - self._last_s < INTERVAL_S and done_nimg < self.total_nimg and not always:
            return
        self._last_s = now
        first_nimg, first_s = self._first
        rate = (done_nimg - first_nimg) / max(now - first_s, 1e-9)
        speed = "starting"
        if rate > 0:
            left = timedelta(seconds=round((self.total_nimg - done_nimg) / rate))
            speed = f"{rate:,.0f} images/s, ETA {left}"
        tail = f", {note}" if note else ""
        logger.info("%s: %s of %s images, %s%s", self.label, f"{done_nimg:,}", f"{self.total_nimg:,}", speed, tail)

    def add(self, nimg: int, note: str = "", always: bool = False) -> None:
        """Say that `nimg` more images are done."""
        self.update(self.done_nimg + nimg, note, always)
