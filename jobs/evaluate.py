"""Measure one model on the report seeds, as a Ray job.

    ray job submit --working-dir . -- python jobs/evaluate.py digits --out /shared/runs/digits

Takes the arguments of `sims evaluate`; the output folder must lie on storage that every node sees.
"""

import sys

from sims_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
