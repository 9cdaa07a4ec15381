"""The features stage: the extractor that distances are measured in, and the moments of the real images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sims_ray.config import ComputeSettings, FeatureSettings
from sims_ray.data.table import SampleTable
from sims_ray.diffusion.noise import step_generator
from sims_ray.diffusion.order import TrainingOrder
from sims_ray.errors import SimsError
from sims_ray.metrics.features import image_features
from sims_ray.metrics.frechet import Statistics
from sims_ray.metrics.moments import Moments, merge_all
from sims_ray.metrics.reference import read_statistics, write_statistics
from sims_ray.nn.classifier import FeatureClassifier
from sims_ray.stages.cluster import as_sentence, start_ray
from sims_ray.stages.extractors import CLASSIFIER, Extractor, load_extractor_of, weights_digest
from sims_ray.stages.inception import local_weights
from sims_ray.stages.progress import Progress
from sims_ray.storage.artifacts import Artifact, read_manifest, sha256_file
from sims_ray.storage.beside import atomic_path
from sims_ray.storage.checkpoints import load_tensors, save_tensors
from sims_ray.storage.folders import absolute
from sims_ray.storage.stores import is_uri

logger = logging.getLogger("sims_ray")

REFERENCE = "reference.npz"
REAL_FEATURES = "features.npy"
REPORT_STEPS = 50
STATISTICS_ADVICE = "give reference statistics with --set features.statistics=FILE, or leave it out"


def make_features(artifact: Artifact, settings: FeatureSettings, table: str | Path, compute: ComputeSettings) -> None:
    """Train the classifier if the settings ask for one, measure the real images, commit.

    Raises:
        SimsError: the classifier needs labels and the images have none.
    """
    if settings.kind == "classifier" and SampleTable(table).num_classes < 2:
        raise SimsError(f"{table} has no labels to train a feature classifier on; set features.kind=pixels")
    statistics = None if settings.statistics is None else absolute(settings.statistics)
    settings = settings.model_copy(update={"weights": absolute_weights(settings), "statistics": statistics})
    name = "classifier"
    if settings.kind != "classifier":  # that the weights are whole, and of such images, before any work
        extractor = load_extractor_of(settings.kind, settings.weights)
        extractor.check(SampleTable(table).shape)
        if settings.statistics is not None:
            _check_width(settings.statistics, extractor, SampleTable(table).shape)
        name = extractor.name
    nimg = settings.steps * settings.batch_size if settings.kind == "classifier" else len(SampleTable(table))
    progress = Progress(f"features ({settings.kind})", nimg)
    for done_nimg in _in_worker(artifact, settings, table, compute):
        progress.update(done_nimg)
    files = [REFERENCE, REAL_FEATURES] + ([CLASSIFIER] if settings.kind == "classifier" else [])
    result: dict[str, Any] = {"kind": settings.kind, "name": name, "weights": settings.weights}
    if settings.kind == "classifier":
        result["accuracy"] = load_tensors(artifact.path / CLASSIFIER)[1]["accuracy"]
        logger.info("features: the classifier gets %.1f %% of its training images right", result["accuracy"] * 100)
    artifact.commit({name: {} for name in files}, result)


def _in_worker(
    artifact: Artifact, settings: FeatureSettings, table: str | Path, compute: ComputeSettings
) -> Iterator[int]:
    """Images done so far, as the work goes on in one Ray task, or here with `num_workers` 0."""
    if not compute.num_workers:
        yield from _make(artifact, settings, table, None)
        return
    ray = start_ray(compute)
    threads = max(1, int(compute.cpus_per_worker))
    task = ray.remote(num_cpus=compute.cpus_per_worker, max_retries=compute.max_failures)(_make)
    try:
        for done in task.remote(artifact, settings, table, threads):
            yield ray.get(done)
    except ray.exceptions.RayError as error:
        raise as_sentence(error, "making the features") from error


def load_extractor(folder: Path, device: torch.device | str = "cpu") -> Extractor:
    """The feature extractor of a features artifact."""
    result = read_manifest(folder)["result"]
    if result["kind"] == "classifier":
        return load_extractor_of("checkpoint", str(folder / CLASSIFIER), device)
    return load_extractor_of(result["kind"], result.get("weights"), device)


def feature_name(folder: Path) -> str:
    """What metrics in the features of an artifact are named after."""
    result = read_manifest(folder)["result"]
    name: str = result.get("name", result["kind"])
    return name


def feature_content(settings: FeatureSettings) -> dict[str, Any]:
    """The settings that features depend on, the weights by their content.

    Raises:
        SimsError: the file of the weights is missing.
    """
    content = settings.model_dump(mode="json", exclude={"weights", "statistics"})
    if settings.statistics is not None:
        content["statistics_sha256"] = sha256_file(local_weights(settings.statistics, STATISTICS_ADVICE))
    if settings.kind != "classifier" and (digest := weights_digest(settings.kind, settings.weights)) is not None:
        content["weights_sha256"] = digest
    return content


def absolute_weights(settings: FeatureSettings) -> str | None:
    """Where the weights lie, as workers on any node find them."""
    weights = settings.weights
    return absolute(weights) if weights is not None and (is_uri(weights) or Path(weights).exists()) else weights


def load_reference(folder: Path) -> Statistics:
    """Mean and covariance of the real images' features, or those that the user gave."""
    return read_statistics(folder / REFERENCE)


def load_real_features(folder: Path) -> NDArray[np.float32]:
    """Features of real images [M, F], a random choice of `features.reference_nimg` of them."""
    features: NDArray[np.float32] = np.load(folder / REAL_FEATURES, allow_pickle=False)
    return features


def statistics_at(location: str) -> Statistics:
    """The reference statistics in a file or at a URI.

    Raises:
        SimsError: there are none.
    """
    try:
        return read_statistics(local_weights(location, STATISTICS_ADVICE))
    except ValueError as error:
        raise SimsError(f"features.statistics: {error}") from None


def _check_width(location: str, extractor: Extractor, shape: tuple[int, ...]) -> None:
    """Raise SimsError unless statistics are as wide as the features that are to be compared with them."""
    width = len(statistics_at(location).mean)
    features = image_features(extractor.features, torch.zeros(1, *shape, dtype=torch.uint8))
    if features.shape[1] != width:
        raise SimsError(
            f"{location} is of features of width {width}, and those of features.kind={extractor.name} have "
            f"{features.shape[1]}; give the statistics of the same extractor"
        )


def _make(
    artifact: Artifact, settings: FeatureSettings, table_path: str | Path, threads: int | None, device: str = "cpu"
) -> Iterator[int]:
    if threads:
        torch.set_num_threads(threads)
    table = SampleTable(table_path)
    artifact.path.mkdir(parents=True, exist_ok=True)
    if settings.kind == "classifier":
        torch.manual_seed(step_generator(settings.seed, 0, "classifier").initial_seed())
        net = FeatureClassifier(table.shape[0], table.num_classes, settings.width, settings.feature_dim)
        yield from _train_classifier(net, settings, table, artifact.path / CLASSIFIER)
        extractor = load_extractor_of("checkpoint", str(artifact.path / CLASSIFIER), device)
    else:
        extractor = load_extractor_of(settings.kind, settings.weights, device)
    chosen = _chosen_rows(len(table), settings)
    parts, kept, done = [], [], 0
    for part in table.files():
        features = image_features(extractor.features, torch.from_numpy(part.images.copy()))
        parts.append(Moments.of(features))
        kept.append(features[chosen[(chosen >= done) & (chosen < done + len(features))] - done])
        done += len(features)
        if settings.kind != "classifier":
            yield done
    with atomic_path(artifact.path / REFERENCE) as beside:
        if settings.statistics is not None:
            write_statistics(beside, statistics_at(settings.statistics))
        else:
            merge_all(parts).save(beside)
    shuffled = np.random.default_rng(settings.seed).permutation(len(chosen))  # so that any first ones are a fair choice
    with atomic_path(artifact.path / REAL_FEATURES) as beside, beside.open("wb") as file:
        np.save(file, np.concatenate(kept)[shuffled])


def _chosen_rows(num_rows: int, settings: FeatureSettings) -> NDArray[np.int64]:
    """Which real images' features are kept, in order."""
    rng = np.random.default_rng(settings.seed)
    return np.sort(rng.choice(num_rows, min(num_rows, settings.reference_nimg), replace=False))


def _train_classifier(
    net: FeatureClassifier, settings: FeatureSettings, table: SampleTable, path: Path
) -> Iterator[int]:
    """Train and write the checkpoint; yields the images seen so far."""
    samples = table.head(len(table))
    images, labels = torch.from_numpy(samples.images.copy()), torch.from_numpy(samples.labels.astype("int64"))
    optimizer = torch.optim.Adam(net.parameters(), settings.lr)
    order = TrainingOrder(settings.seed, len(images), len(images))
    for step in range(settings.steps):
        rows = order.rows(step * settings.batch_size, settings.batch_size)
        loss = F.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % REPORT_STEPS == 0 or step == settings.steps - 1:
            yield (step + 1) * settings.batch_size
    net.eval().requires_grad_(False)
    predicted = torch.cat([net(batch).argmax(1) for batch in torch.split(images, 512)])
    architecture = {"width": settings.width, "feature_dim": settings.feature_dim}
    architecture |= {"img_channels": table.shape[0], "num_classes": table.num_classes}
    accuracy = float((predicted == labels).double().mean())
    card = {"role": "feature classifier", "architecture": architecture, "data": table.fingerprint, "accuracy": accuracy}
    card["resolution"] = list(table.shape[1:])  # other sizes pass through it as well, but mean nothing
    save_tensors(path, net.state_dict(), card)
