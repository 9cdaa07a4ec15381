"""Train the base model, as a Ray job.

    ray job submit --working-dir . -- python jobs/train_base.py digits --out /shared/runs/digits

Takes the arguments of `sims train`; the output folder must lie on storage that every node sees.
"""

import sys

from sims_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
