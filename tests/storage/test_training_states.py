"""States that are torn, killed, cut off or without a place: the newest whole one is found, and the rest is named."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST, new_manifest, write_json
from sims_ray.storage.beside import hidden_path
from sims_ray.storage.checkpoints import load_tensors, save_tensors
from sims_ray.storage.training_states import WAITS_S, TrainingStates, save_patiently, state_path

CARD = {"role": "training state", "of": "abc"}
MOMENTS_S = (0.002,) * 3
PATIENT_S = (0.002,) * 20_000
DEADLINE_S = 30


def tensors_at(nimg: int) -> dict[str, Tensor]:
    return {"x": torch.full((100,), float(nimg)), "steps": torch.tensor(nimg)}


def saved(folder: Path, *positions: int, keep: int = 99) -> TrainingStates:
    """States at these positions, all on disk."""
    with TrainingStates(folder, keep) as states:
        for nimg in positions:
            states.save(nimg, tensors_at(nimg), CARD)
    return states


def assert_found(states: TrainingStates, nimg: int) -> None:
    found = states.newest()
    assert found is not None
    assert found[0].keys() == tensors_at(nimg).keys()
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors_at(nimg).items())
    assert found[1] == {**CARD, "nimg": nimg}


def torn_at(percent: int) -> Callable[[Path], None]:
    def tear(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * percent // 100])

    return tear


def flipped_at(position: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 0x04
        path.write_bytes(content)

    return flip


def without_card(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


DAMAGES = {
    "torn at 0 %": torn_at(0),
    "torn at 50 %": torn_at(50),
    "torn at 99 %": torn_at(99),
    "a flipped byte in the header's length": flipped_at(1),
    "a flipped byte in the header": flipped_at(30),
    "a flipped byte in the data": flipped_at(-200),
    "a flipped last byte": flipped_at(-1),
    "no card": without_card,
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@contextmanager
def announced(text: str) -> Iterator[threading.Event]:
    """An event that is set once the package logs this text."""
    seen = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                seen.set()

    listener = Listener()
    logging.getLogger("sims_ray").addHandler(listener)
    try:
        yield seen
    finally:
        logging.getLogger("sims_ray").removeHandler(listener)


def fails(number: int, times: int) -> Callable[[int], None]:
    """An `os.fsync` of a storage that fails so many times."""
    left = [times]

    def fsync(_: int) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))

    return fsync


def test_without_states_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state-notes.safetensors").write_text("someone's file")
    for folder in (tmp_path, tmp_path / "absent"):
        states = TrainingStates(folder)
        assert states.newest() is None
        assert states.newest_nimg() == 0
    assert warnings_of(caplog) == []


def test_the_newest_state_is_the_one_of_most_images_before_the_limit(tmp_path: Path) -> None:
    saved(tmp_path, 900_000, 1_000_000, 5_000)
    states = TrainingStates(tmp_path)
    assert_found(states, 1_000_000)
    assert states.newest_nimg() == 1_000_000
    assert states.newest_nimg(before_nimg=1_000_001) == 1_000_000
    assert states.newest_nimg(before_nimg=1_000_000) == 900_000
    assert states.newest_nimg(before_nimg=5_000) == 0
    found = states.newest(before_nimg=900_000)
    assert found is not None
    assert found[1]["nimg"] == 5_000


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1000, 2000)
    DAMAGES[damage](state_path(tmp_path, 2000))
    states = TrainingStates(tmp_path)
    assert_found(states, 1000)
    assert states.newest_nimg() == 1000
    warnings = warnings_of(caplog)
    assert len(warnings) == 2
    for warning in warnings:
        assert str(state_path(tmp_path, 2000)) in warning
        assert "state-000000001000.safetensors is used instead" in warning
        assert "\n" not in warning


def test_of_several_torn_states_every_one_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 1000, 2000, 3000, 4000)
    for nimg in (2000, 4000, 3000):
        torn_at(50)(state_path(tmp_path, nimg))
    assert_found(TrainingStates(tmp_path), 1000)
    for nimg, warning in zip((4000, 3000, 2000), warnings_of(caplog), strict=True):
        assert state_path(tmp_path, nimg).name in warning


def test_where_all_are_torn_training_begins_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 1000, 2000)
    for nimg in (1000, 2000):
        flipped_at(-1)(state_path(tmp_path, nimg))
    states = TrainingStates(tmp_path)
    assert states.newest() is None
    assert [warning.endswith("training begins anew") for warning in warnings_of(caplog)] == [True, True]
    caplog.clear()
    assert states.newest_nimg(quiet=True) == 0
    assert states.newest(quiet=True) is None
    assert warnings_of(caplog) == []


def test_a_state_is_what_the_tensors_were_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, sync = threading.Event(), os.fsync

    def wait(file: int) -> None:
        assert changed.wait(DEADLINE_S)
        sync(file)

    monkeypatch.setattr(os, "fsync", wait)
    tensors = {
        "x": torch.ones(100, 10),
        "transposed": torch.ones(3, 4).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with TrainingStates(tmp_path) as states:
        states.save(1, tensors, CARD)
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
        changed.set()
    loaded, _ = load_tensors(state_path(tmp_path, 1))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_state_on_a_gpu_is_what_it_was_when_it_was_saved(tmp_path: Path) -> None:
    tensor = torch.zeros(1 << 26, device="cuda")
    for i in range(100):  # work that is still under way when the state is saved
        tensor += i
    expected = float(sum(range(100)))
    with TrainingStates(tmp_path) as states:
        states.save(1, {"x": tensor}, CARD)
        tensor.zero_()
    assert torch.all(load_tensors(state_path(tmp_path, 1))[0]["x"] == expected)


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.randn(3, 5).mul(50).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    }
    with TrainingStates(tmp_path) as states:
        states.save(1, tensors, CARD)
    found = states.newest()
    assert found is not None
    assert all(found[0][name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())


def test_the_same_state_has_the_same_bytes(tmp_path: Path) -> None:
    contents = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        saved(tmp_path / name, 1000)
        contents.add(state_path(tmp_path / name, 1000).read_bytes())
    assert len(contents) == 1


def test_training_goes_on_while_a_state_is_written_and_the_next_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, order, sync = threading.Semaphore(0), threading.Semaphore(0), [], os.fsync

    def slowly(file: int) -> None:
        begun.release()
        assert go.acquire(timeout=DEADLINE_S)
        order.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        sync(file)

    monkeypatch.setattr(os, "fsync", slowly)
    states = TrainingStates(tmp_path)
    states.save(1000, tensors_at(1000), CARD)  # it returns, though nothing can be written yet
    second = threading.Thread(target=states.save, args=(2000, tensors_at(2000), CARD))
    second.start()
    assert begun.acquire(timeout=DEADLINE_S)
    assert not begun.acquire(timeout=0.1)
    assert second.is_alive()
    go.release()
    second.join(DEADLINE_S)
    go.release()
    states.close()
    assert [name.split(".")[1] for name in order] == ["state-000000001000", "state-000000002000"]
    assert_found(states, 2000)


def test_the_newest_are_kept_and_what_is_asked_for_and_what_a_manifest_lists(tmp_path: Path) -> None:
    saved(tmp_path, 1000, 2000, 3000)
    listed = state_path(tmp_path, 2000).name
    write_json(tmp_path / MANIFEST, new_manifest("train", {}, [], {listed: {"sha256": "0", "bytes": 1}}, {}))
    with TrainingStates(tmp_path, keep=2) as states:
        for nimg in range(4000, 9000, 1000):
            states.save(nimg, tensors_at(nimg), CARD, keep_also=[3000, 5000])
    assert list(states.paths()) == [8000, 7000, 5000, 3000, 2000]
    with pytest.raises(SimsError, match="keep=0"):
        TrainingStates(tmp_path, keep=0)


def test_nothing_is_removed_before_the_new_state_is_whole_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1000)
    replace, before = os.replace, []

    def look(source: Path, target: Path) -> None:
        before.append(sorted(TrainingStates(tmp_path).paths()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    saved(tmp_path, 2000, 3000, keep=1)
    assert before == [[1000], [2000]]
    assert list(TrainingStates(tmp_path).paths()) == [3000]


def test_a_manifest_that_cannot_be_read_keeps_every_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / MANIFEST).write_text("{")
    states = saved(tmp_path, 1000, 2000, keep=1)
    assert list(states.paths()) == [2000, 1000]
    assert ["older states" in warning for warning in warnings_of(caplog)] == [True, True]


def test_torn_states_take_no_place_among_the_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1000, 2000, 3000, 9000)
    for nimg in (3000, 9000):
        flipped_at(-1)(state_path(tmp_path, nimg))
    with TrainingStates(tmp_path, keep=2) as states:
        assert states.newest_nimg() == 2000
        states.save(4000, tensors_at(4000), CARD)
    assert list(states.paths()) == [4000, 2000]


def test_states_of_more_images_than_the_saved_one_stay(tmp_path: Path) -> None:
    saved(tmp_path, 1000, 8000, 9000)
    assert list(saved(tmp_path, 2000, 3000, keep=1).paths()) == [9000, 8000, 3000]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_the_last_state_is_intact(small_disk: Path) -> None:
    states = TrainingStates(small_disk, waits_s=PATIENT_S)
    states.save(1000, tensors_at(1000), CARD)
    states.save(2000, {"x": torch.randn(500_000)}, CARD)
    with pytest.raises(SimsError, match=r"needs 2,000,000 bytes and [\d,]+ bytes are free") as error:
        states.close()
    for part in (str(small_disk), "state-000000002000", "the last checkpoint is intact", "run the same command again"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in small_disk.iterdir()] == [state_path(small_disk, 1000).name]
    assert_found(states, 1000)
    states.save(3000, tensors_at(3000), CARD)  # space was freed
    states.close()
    assert_found(states, 3000)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_at_once(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1000)
    monkeypatch.setattr(os, "fsync", fails(number, 1))
    states = TrainingStates(tmp_path)  # with its waits of minutes
    states.save(2000, tensors_at(2000), CARD)
    with pytest.raises(SimsError, match="is full"):
        states.save(3000, tensors_at(3000), CARD)
    assert warnings_of(caplog) == []
    assert_found(states, 1000)
    states.check()  # it was told once


def test_a_storage_that_comes_back_gets_the_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    with TrainingStates(folder, waits_s=PATIENT_S) as states, announced("is away") as gone:
        states.save(1000, tensors_at(1000), CARD)
        states.close()
        folder.rename(away)
        states.save(2000, tensors_at(2000), CARD)
        assert gone.wait(DEADLINE_S)
        states.check()
        away.rename(folder)
    assert_found(states, 2000)
    (warning,) = warnings_of(caplog)
    assert str(state_path(folder, 2000)) in warning
    assert "retried" in warning


def test_a_storage_that_fails_in_the_middle_gets_the_state_once_it_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", fails(errno.EIO, len(MOMENTS_S)))
    with TrainingStates(tmp_path, waits_s=MOMENTS_S) as states:
        states.save(1000, tensors_at(1000), CARD)
    assert_found(states, 1000)
    assert [path.name for path in tmp_path.iterdir()] == [state_path(tmp_path, 1000).name]
    assert len(warnings_of(caplog)) == 1


def test_a_storage_that_stays_away_is_one_sentence_and_no_folder_in_its_place(tmp_path: Path) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    states = TrainingStates(folder, waits_s=MOMENTS_S)
    states.save(1000, tensors_at(1000), CARD)
    states.close()
    folder.rename(away)
    states.save(2000, tensors_at(2000), CARD)
    with pytest.raises(SimsError, match="cannot be written") as error:
        states.close()
    assert str(state_path(folder, 2000)) in str(error.value)
    assert "the last checkpoint is intact" in str(error.value)
    assert "\n" not in str(error.value)
    assert not folder.exists()
    with pytest.raises(SimsError, match="the last checkpoint is intact"):
        save_patiently(folder / "ema.safetensors", tensors_at(1), CARD, MOMENTS_S)
    away.rename(folder)
    assert_found(states, 1000)


def test_a_state_that_cannot_be_read_is_not_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 1000)
    path, away = state_path(tmp_path, 2000), tmp_path / "away"
    path.symlink_to(away)  # listed, and not there
    with pytest.raises(SimsError, match="no checkpoint at"):
        TrainingStates(tmp_path, waits_s=MOMENTS_S).newest()
    save_tensors(tmp_path / "back", tensors_at(2000), {**CARD, "nimg": 2000})
    found: list[int] = []
    with announced("is away") as gone:
        reader = threading.Thread(
            target=lambda: found.append(TrainingStates(tmp_path, waits_s=PATIENT_S).newest_nimg()), daemon=True
        )
        reader.start()
        assert gone.wait(DEADLINE_S)
        (tmp_path / "back").rename(away)
        reader.join(DEADLINE_S)
    assert found == [2000]
    assert all("is away" in warning for warning in warnings_of(caplog))


def test_the_waits_double_and_sum_to_about_five_minutes() -> None:
    assert 240 <= sum(WAITS_S) <= 360
    assert list(WAITS_S) == [min(2.0**i, 64.0) for i in range(len(WAITS_S))]


def test_what_ended_the_training_comes_before_what_the_write_ran_into(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises(SimsError, match="the loss"),
        TrainingStates(tmp_path / "absent", waits_s=()) as states,
    ):
        states.save(1000, tensors_at(1000), CARD)
        raise SimsError("the loss is no longer a number")
    (warning,) = warnings_of(caplog)
    assert "cannot be written" in warning


def test_an_unforeseen_error_in_the_background_is_a_sentence_too(tmp_path: Path) -> None:
    states = TrainingStates(tmp_path)
    states.save(1000, tensors_at(1000), {"no JSON": object()})
    with pytest.raises(SimsError, match="state-000000001000") as error:
        states.close()
    assert "\n" not in str(error.value)


DIES = """
import os, resource, signal, sys
from pathlib import Path
import torch
from sims_ray.storage.training_states import TrainingStates

folder, death = Path(sys.argv[1]), sys.argv[2]
states = TrainingStates(folder)
card = {"role": "training state", "of": "abc"}
states.save(1000, {"x": torch.full((100,), 1000.0), "steps": torch.tensor(1000)}, card)
states.close()
if death == "half of its bytes":  # the system kills it in the middle of a write
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))
else:
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
states.save(2000, {"x": torch.ones(8 << 20)}, {})
states.close()
"""


@pytest.mark.parametrize("death", ["half of its bytes", "all of its bytes, before it has its name"])
def test_a_process_killed_while_it_writes_leaves_the_state_before(
    tmp_path: Path, death: str, caplog: pytest.LogCaptureFixture
) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path), death], timeout=60)
    assert done.returncode in (-signal.SIGKILL, -signal.SIGXFSZ)
    (left,) = tmp_path.glob(".*.tmp")
    assert left.stat().st_size >= 16 << 20
    states = TrainingStates(tmp_path)
    assert_found(states, 1000)
    assert warnings_of(caplog) == []
    states.sweep()
    assert not left.exists()


def test_a_sweep_spares_what_a_live_process_writes(tmp_path: Path) -> None:
    alive = hidden_path(tmp_path / "average.safetensors")
    alive.touch()
    TrainingStates(tmp_path).sweep()
    assert alive.exists()


def test_what_a_lost_node_was_writing_goes_with_the_next_state(tmp_path: Path) -> None:
    lost = tmp_path / ".state-000000001000.safetensors.other-node-17-0a1b2c3d.tmp"
    others = tmp_path / ".losses.csv.other-node-17-0a1b2c3d.tmp"
    for path in (lost, others):
        path.touch()
    saved(tmp_path, 2000)
    assert not lost.exists()
    assert others.exists()
