"""Snapshots of EDM and EDM2 (pickles of NVIDIA's) brought in without running what they contain."""

from sims_ray.storage.nvlabs.importer import import_nvlabs

__all__ = ["import_nvlabs"]
