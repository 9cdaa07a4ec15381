"""`python -m sims_ray.cli`, the same as `sims`."""

from sims_ray.cli import main

main()
