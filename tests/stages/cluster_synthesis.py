"""Synthesis on a cluster of three nodes, one of which is lost on the way; a process of its own.

python cluster_synthesis.py SET BASE N SHARD_NIMG FILES_BEFORE_THE_LOSS NOTES
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from sims_ray.config import ComputeSettings, SamplerSettings
from sims_ray.stages.cluster import QUIET, stop_ray
from sims_ray.stages.synthesize import synthesize
from sims_ray.storage.models import SimsModel
from sims_ray.studies.synthetic import synthesis_job

DEADLINE_S = 300.0
SOON = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # a lost node is noticed in seconds


def main(out: str, base: str, n: str, shard_nimg: str, files: str, notes: str) -> None:
    """Make the set; note which files lay there when the node was taken away."""
    os.environ.update(QUIET)
    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "_system_config": SOON}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    model, seeds = SimsModel.of(Path(base)), range(int(n))
    job = synthesis_job(out, model, SamplerSettings(), seeds, shard_nimg=int(shard_nimg))
    failed: list[BaseException] = []

    def make() -> None:
        try:
            synthesize([job], ComputeSettings(num_workers=1, max_workers=3))
        except BaseException as error:
            failed.append(error)

    maker = threading.Thread(target=make)
    maker.start()
    deadline = time.monotonic() + DEADLINE_S
    while len(job.set.folder.files()) < int(files) and maker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    times = {path.name: path.stat().st_mtime_ns for path in Path(out).glob("seeds-*")}
    cluster.remove_node(nodes[-1], allow_graceful=False)
    Path(notes).write_text(json.dumps(times))
    maker.join(DEADLINE_S)
    stop_ray()
    cluster.shutdown()
    sys.exit(f"failed: {failed}" if failed or maker.is_alive() else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
