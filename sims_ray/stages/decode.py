"""The decode stage: an image table from a latent table, one file at a time, then the manifest.

A file that is there and whole is kept, whoever made it; the manifest comes last.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sims_ray.config import ComputeSettings
from sims_ray.data.decode import BATCH_SIZE, DecodeJob, LatentDecoder, decode_file
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.stages.pool import run_on_pool
from sims_ray.stages.progress import Progress
from sims_ray.storage.folders import Folder
from sims_ray.storage.latents import choose_latents
from sims_ray.storage.vae import VaeFiles

logger = logging.getLogger("sims_ray")


class DecodeWorker:
    """Decodes files of latents on one CPU slot or GPU; the VAE stays loaded between files.

    Raises:
        SimsError: the VAE is not there, or is another one than the table is made with.
    """

    def __init__(self, job: DecodeJob, batch_size: int, compute: ComputeSettings) -> None:
        # In a process of its own, not in the caller's, where other work goes on.
        self._threads = max(1, int(compute.cpus_per_worker)) if compute.num_workers else None
        self._job = job
        self._decoder = LatentDecoder(job.space, "cuda" if compute.gpus_per_worker else "cpu", batch_size)
        if self._decoder.files.identity != job.vae:
            raise SimsError(f"{self._decoder.files.folder} holds another VAE here than where decoding began; copy it")

    def run(self, name: str) -> dict[str, Any]:
        """Leave one file; returns its facts."""
        if self._threads:
            torch.set_num_threads(self._threads)
        return decode_file(self._job, name, self._decoder)


def decode_table(
    source: str | Path,
    target: str | Path,
    compute: ComputeSettings,
    *,
    vae: str | None = None,
    latents: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> SampleTable:
    """Make an image table from a latent table; what is decoded there already is kept.

    Args:
        source, target: folders or URIs.
        compute: workers; 0 of them decode in this process.
        vae: folder or hub name of the VAE; None for the one that the table names.
        latents: how the latents relate to pixels, as `choose_latents` takes it; None for what the table says.
        batch_size: latents per call of the VAE.

    Raises:
        SimsError: the table holds images, its VAE is not known or not there, or the target holds something else.
    """
    table, folder = SampleTable(source), Folder.at(target)
    job, rows = _job(table, folder, vae, latents), table.file_rows
    folder.check_writable()
    folder.sweep()
    kept, torn = job.survey(table)
    for name, reason in torn.items():
        logger.warning("decode: %s/%s %s; made again", folder, name, reason)
    progress = Progress("decode", len(table), sum(rows[name] for name in kept))
    todo = [name for name in rows if name not in kept]
    for name, facts in run_on_pool(todo, partial(DecodeWorker, job, batch_size), compute, "decoding"):
        kept[name] = facts
        progress.add(rows[name])
    job.commit(table, kept)
    return SampleTable(folder)


def _job(table: SampleTable, folder: Folder, vae: str | None, latents: str | None) -> DecodeJob:
    """What to make, checked before any work."""
    if table.kind != "latent":
        raise SimsError(f"{table.folder} holds images already; give a table of latents")
    if folder.location == table.folder.location:
        raise SimsError(f"{folder} holds the latents themselves; give another folder for the images")
    space = choose_latents(table.manifest["result"].get("latents"), latents, vae, str(table.folder))
    files = VaeFiles.find(space.vae)
    files.image_shape(table.shape)
    if Path(space.vae).is_dir():  # workers have another working directory
        space = replace(space, vae=str(files.folder))
    return DecodeJob(table.folder.location, folder.location, space, files.identity, table.fingerprint)
