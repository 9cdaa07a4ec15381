"""Base training on a cluster of several nodes that come and go; a process of its own, begun in the repository.

python -m tests.stages.cluster_training lose OUT NIMG
python -m tests.stages.cluster_training notice OUT RECORDS
python -m tests.stages.cluster_training resize OUT RECORDS
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sims_ray.config import load_recipe
from sims_ray.diffusion.order import Rows, Share, TrainingData
from sims_ray.stages.cluster import QUIET, stop_ray
from sims_ray.stages.reading import Source
from sims_ray.stages.training_set import TrainingSet
from sims_ray.storage.training_states import TrainingStates
from tests.processes import MARK, parent, titled
from tests.stages.training_runs import BATCH_NIMG, DEADLINE_S, SETTINGS, STOP_NIMG, await_true, folder_of, trained_nimg

WORKER = "ray::RayTrainWorker"
SOON = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # a lost node is noticed in seconds
PATIENCE = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}  # after a loss Ray first waits for what is gone
LIMIT = "limit"  # file with the images seen at which every worker waits
NOTICED_NIMG = 1536  # where training waits while notice is given
GROWN_NIMG, SHRUNK_NIMG = 2240, 5312  # where training waits to be given two nodes, and to lose one


@dataclass(frozen=True)
class Recorded:
    """A source whose workers write down what they are given, and wait at a limit.

    Attributes:
        source: the source itself.
        folder: where each worker process leaves a file `world-rank-pid`, a line per batch: time, nimg, ids.
    """

    source: Source
    folder: Path

    @property
    def training_set(self) -> TrainingSet:
        return self.source.training_set

    def open(self, share: Share) -> TrainingData:
        path = self.folder / f"{share.world_size}-{share.rank}-{os.getpid()}"
        path.touch()
        return RecordedBatches(self.source.open(share), path)


@dataclass(frozen=True)
class RecordedBatches:
    """The batches of one worker, written down."""

    batches: TrainingData
    path: Path

    def batch(self, nimg: int) -> Rows:
        while nimg >= int((self.path.parent / LIMIT).read_text()):
            time.sleep(0.02)
        rows = self.batches.batch(nimg)
        with self.path.open("a") as file:
            file.write(json.dumps([time.time_ns(), nimg, rows.ids.tolist()]) + "\n")
        return rows


def opened(records: Path, world_size: int) -> set[str]:
    """The workers of a world of this size that have opened the source."""
    return {path.name for path in records.glob(f"{world_size}-*-*")}


class Nodes:
    """A cluster with a head that trains nothing, and nodes with room for one training worker each."""

    def __init__(self) -> None:
        os.environ.update(QUIET | PATIENCE)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": 100 << 20, "_system_config": SOON}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        os.environ["RAY_ADDRESS"] = self.cluster.address

    def grow(self, number: int) -> None:
        self.nodes += [self.cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(number)]
        self.cluster.wait_for_nodes()

    def at_work(self) -> Any:
        """A node that holds a training worker."""
        raylets = {parent(pid) for pid in titled(os.environ[MARK], WORKER)}
        return next(n for n in self.nodes if n.all_processes["raylet"][0].process.pid in raylets)

    def lose(self, node: Any) -> None:
        """Take away a node with all its processes."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def give_notice(self, node: Any) -> None:
        """Have it known that a node will be taken away, as a provider of spot machines does."""
        words = ["drain-node", f"--address={self.cluster.address}", f"--node-id={node.node_id}"]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=600"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words, *reason], check=True)

    def end(self) -> None:
        stop_ray()
        self.cluster.shutdown()


class Trainer:
    """The training, in a thread: nodes come and go in the main one."""

    def __init__(self, out: Path, *overrides: str) -> None:
        from sims_ray.studies.sims import SimsRun

        self._run = SimsRun(load_recipe("digits", [*SETTINGS, *overrides]), out)
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def _train(self) -> None:
        try:
            self._run.train_base()
        except BaseException as error:
            self._failed.append(error)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition while training goes on."""
        await_true(lambda: condition() or not self._thread.is_alive(), what)
        if not condition():
            sys.exit(f"training ended before {what}: {self._failed}")

    def end(self) -> None:
        self._thread.join(DEADLINE_S)
        if self._failed or self._thread.is_alive():
            sys.exit(f"training failed: {self._failed or 'it does not end'}")


def lose(out: Path, nimg: int) -> None:
    """Two workers on three nodes, one of which is lost when `nimg` images were seen."""
    nodes = Nodes()
    nodes.grow(3)
    trainer = Trainer(out, "compute.num_workers=2")
    trainer.wait(lambda: trained_nimg(out) >= nimg, f"{nimg} images were seen")
    nodes.lose(nodes.at_work())
    trainer.end()
    nodes.end()


def notice(out: Path, records: Path) -> None:
    """Two workers on three nodes, one of which is lost some time after notice was given."""
    hold(records, NOTICED_NIMG)
    nodes = Nodes()
    nodes.grow(3)
    trainer = Trainer(out, "compute.num_workers=2", f"train.checkpoint_kimg={STOP_NIMG / 1000:g}")
    trainer.wait(lambda: trained_nimg(out) >= NOTICED_NIMG, f"{NOTICED_NIMG} images were seen")
    node = nodes.at_work()
    nodes.give_notice(node)
    for nimg in range(NOTICED_NIMG + BATCH_NIMG, STOP_NIMG, BATCH_NIMG):  # a step at a time: notice takes its time
        wait_at(records, nimg)
        trainer.wait(lambda nimg=nimg: trained_nimg(out) >= nimg, f"{nimg} images were seen")
        time.sleep(0.2)
        if TrainingStates(folder_of(out)).paths():
            break
    nodes.lose(node)
    wait_at(records, 2 * STOP_NIMG)
    trainer.end()
    nodes.end()


def resize(out: Path, records: Path) -> None:
    """One to three workers on one node, then three, then two."""
    hold(records, GROWN_NIMG)
    nodes = Nodes()
    nodes.grow(1)
    trainer = Trainer(out, "compute.num_workers=1", "compute.max_workers=3", "compute.resize_s=2")
    trainer.wait(lambda: trained_nimg(out) >= GROWN_NIMG, "one worker was at work")
    nodes.grow(2)
    trainer.wait(lambda: len(opened(records, 3)) == 3, "three workers were at work")
    wait_at(records, SHRUNK_NIMG)
    trainer.wait(lambda: trained_nimg(out) >= SHRUNK_NIMG, "three workers had trained")
    before = opened(records, 2)
    nodes.lose(nodes.at_work())
    trainer.wait(lambda: len(opened(records, 2) - before) == 2, "two workers were at work")
    wait_at(records, 2 * STOP_NIMG)
    trainer.end()
    nodes.end()


def hold(records: Path, nimg: int) -> None:
    """Have every worker of the trainings of this process write down what it is given, and wait at `nimg`."""
    import sims_ray.stages.train as stage

    open_source = stage.open_source

    @contextmanager
    def recorded(*args: Any) -> Iterator[Recorded]:
        with open_source(*args) as source:
            yield Recorded(source, records)

    stage.open_source = recorded
    wait_at(records, nimg)


def wait_at(records: Path, nimg: int) -> None:
    """Let training go on, as far as `nimg` images seen."""
    beside = records / f".{LIMIT}"
    beside.write_text(str(nimg))
    os.replace(beside, records / LIMIT)


if __name__ == "__main__":
    out = Path(sys.argv[2])
    if sys.argv[1] == "lose":
        lose(out, int(sys.argv[3]))
    else:
        {"resize": resize, "notice": notice}[sys.argv[1]](out, Path(sys.argv[3]))
