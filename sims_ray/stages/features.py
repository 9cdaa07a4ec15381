"""The features stage: the extractor that distances are measured in, and the moments of the real images."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from sims_ray.config import ComputeSettings, FeatureSettings
from sims_ray.data.table import SampleTable
from sims_ray.diffusion.noise import epoch_order, step_generator
from sims_ray.errors import SimsError
from sims_ray.metrics.features import FeatureExtractor, images_moments, pixel_features
from sims_ray.metrics.moments import Moments, merge_all
from sims_ray.nn.classifier import FeatureClassifier
from sims_ray.stages.cluster import start_ray
from sims_ray.storage.artifacts import Artifact, atomic_path, read_manifest
from sims_ray.storage.checkpoints import load_tensors, save_tensors

logger = logging.getLogger("sims_ray")

CLASSIFIER = "classifier.safetensors"
REFERENCE = "reference.npz"


def make_features(artifact: Artifact, settings: FeatureSettings, table: Path, compute: ComputeSettings) -> None:
    """Train the classifier if the settings ask for one, measure the real images, commit.

    Raises:
        SimsError: the classifier needs labels and the images have none.
    """
    if settings.kind == "classifier" and SampleTable(table).num_classes < 2:
        raise SimsError(f"{table} has no labels to train a feature classifier on; set features.kind=pixels")
    started_s = time.monotonic()
    logger.info("features: %s, on %s real images", settings.kind, f"{len(SampleTable(table)):,}")
    if compute.num_workers:
        ray = start_ray(compute)
        task = ray.remote(num_cpus=compute.cpus_per_worker, max_retries=compute.max_failures)(_make)
        accuracy = ray.get(task.remote(artifact, settings, table, max(1, int(compute.cpus_per_worker))))
    else:
        accuracy = _make(artifact, settings, table, None)
    files = [REFERENCE] + ([CLASSIFIER] if settings.kind == "classifier" else [])
    artifact.commit({name: {} for name in files}, {"kind": settings.kind, "accuracy": accuracy})
    logger.info(
        "features: done in %.0f s%s",
        time.monotonic() - started_s,
        "" if accuracy is None else f", classifier accuracy on its training images {accuracy:.1%}",
    )


def load_extractor(folder: Path) -> FeatureExtractor:
    """The feature extractor of a features artifact."""
    if read_manifest(folder)["result"]["kind"] == "pixels":
        return pixel_features
    return _load_classifier(folder / CLASSIFIER).features


def load_reference(folder: Path) -> Moments:
    """Moments of the real images' features."""
    return Moments.load(folder / REFERENCE)


def _make(artifact: Artifact, settings: FeatureSettings, table_path: Path, threads: int | None) -> float | None:
    if threads:
        torch.set_num_threads(threads)
    table = SampleTable(table_path)
    artifact.path.mkdir(parents=True, exist_ok=True)
    accuracy: float | None = None
    extractor: FeatureExtractor = pixel_features
    if settings.kind == "classifier":
        net, accuracy = _train_classifier(settings, table)
        architecture = {k: getattr(settings, k) for k in ("width", "feature_dim")}
        architecture |= {"img_channels": table.shape[0], "num_classes": table.num_classes}
        card = {"role": "feature classifier", "architecture": architecture, "data": table.fingerprint}
        save_tensors(artifact.path / CLASSIFIER, net.state_dict(), card)
        extractor = net.features
    moments = merge_all(images_moments(extractor, [torch.from_numpy(part.images.copy())]) for part in table.files())
    with atomic_path(artifact.path / REFERENCE) as beside:
        moments.save(beside)
    return accuracy


def _train_classifier(settings: FeatureSettings, table: SampleTable) -> tuple[FeatureClassifier, float]:
    samples = table.head(len(table))
    images, labels = torch.from_numpy(samples.images.copy()), torch.from_numpy(samples.labels.astype("int64"))
    torch.manual_seed(step_generator(settings.seed, 0, "classifier").initial_seed())
    net = FeatureClassifier(table.shape[0], table.num_classes, settings.width, settings.feature_dim)
    optimizer = torch.optim.Adam(net.parameters(), settings.lr)
    for step in range(settings.steps):
        rows = epoch_order(settings.seed, step * settings.batch_size, settings.batch_size, len(images))
        loss = F.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    net.eval().requires_grad_(False)
    predicted = torch.cat([net(batch).argmax(1) for batch in torch.split(images, 512)])
    return net, float((predicted == labels).double().mean())


def _load_classifier(path: Path) -> FeatureClassifier:
    tensors, card = load_tensors(path)
    net = FeatureClassifier(**card["architecture"])
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)
