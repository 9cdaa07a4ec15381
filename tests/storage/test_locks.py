"""Laws of the lock: one at a time, and the death of the holder lets the next one in."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

from sims_ray.storage.locks import alone

HOLD = """
import sys, time
from pathlib import Path
from sims_ray.storage.locks import alone
with alone(Path(sys.argv[1]), "holding"):
    print("in", flush=True)
    time.sleep(600)
"""


def test_the_death_of_the_holder_lets_the_next_one_in_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "in\n"
    inside = threading.Event()

    def enter() -> None:
        with alone(path, "waiting"):
            inside.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not inside.wait(1.0)
    holder.send_signal(signal.SIGKILL)
    assert inside.wait(60)
    waiting.join()
    holder.wait()
    with alone(path, "again"):
        pass


def test_other_files_are_other_locks(tmp_path: Path) -> None:
    with alone(tmp_path / "a.lock", "one"), alone(tmp_path / "b.lock", "two"):
        pass
