"""Sample the synthetic set from the base, as a Ray job.

    ray job submit --working-dir . -- python jobs/synthesize.py digits --out /shared/runs/digits

Takes the arguments of `sims synthesize`; the output folder must lie on storage that every node sees.
"""

import sys

from sims_ray.cli import main

if __name__ == "__main__":
    main(["synthesize", *sys.argv[1:]])
