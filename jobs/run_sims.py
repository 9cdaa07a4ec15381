"""Run SIMS end to end, as a Ray job.

    ray job submit --working-dir . -- python jobs/run_sims.py digits --out /shared/runs/digits

Takes the arguments of `sims run`; the output folder must lie on storage that every node sees.
"""

import sys

from sims_ray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
