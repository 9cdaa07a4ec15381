"""Fine-tune the auxiliary on the synthetic set, as a Ray job.

    ray job submit --working-dir . -- python jobs/finetune_aux.py digits --out /shared/runs/digits

Takes the arguments of `sims finetune`; the output folder must lie on storage that every node sees.
"""

import sys

from sims_ray.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
