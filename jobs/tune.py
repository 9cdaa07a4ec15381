"""Search omega, B and n_s, as a Ray job.

    ray job submit --working-dir . -- python jobs/tune.py digits --out /shared/runs/digits

Takes the arguments of `sims tune`; the output folder must lie on storage that every node sees.
"""

import sys

from sims_ray.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
