"""`sims data decode`, and `sims sample` from models of latents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sims_ray.data.decode import LatentDecoder
from sims_ray.data.samples import Samples, write_samples
from sims_ray.data.table import SampleTable, table_result
from sims_ray.diffusion.generate import generate
from sims_ray.storage.artifacts import Artifact
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.storage.latents import LatentSpace
from tests.cli.words import sims
from tests.networks import SETTINGS, small_network
from tests.storage.test_latents import save_vae

NETWORK = {**SETTINGS, "img_channels": 4}
SCHEDULE = {"num_steps": 3, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae")


def model(path: Path, **card: Any) -> Path:
    save_tensors(path, small_network(img_channels=4).state_dict(), {"role": "base", "network": NETWORK, **card})
    return path


def table(folder: Path, **result: Any) -> Path:
    values = np.random.default_rng(0).standard_normal((5, 4, 4, 4)).astype(np.float16)
    samples = Samples(np.arange(5), values, np.zeros(5, np.int32))
    write_samples(folder / "a.parquet", samples, {})
    facts = table_result((4, 4, 4), samples.labels, 5, "latent")
    Artifact(folder, "synthesize", {}, ()).commit({"a.parquet": {"rows": 5}}, {**facts, **result})
    return folder


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and "; " in error
    return error


def test_a_table_of_latents_becomes_a_table_of_images(
    tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "latents", latents={"vae": vae, "scaling_factor": 0.2})
    assert sims("data", "decode", source, tmp_path / "images") == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'images'}: 5 images of shape (3, 16, 16)"
    options = ("--vae", vae, "--latents", "{scaling_factor: 0.2}", "--batch", "2")
    assert sims("data", "decode", table(tmp_path / "silent"), tmp_path / "again", *options) == 0
    one, other = (SampleTable(tmp_path / name).head(5).images.astype(int) for name in ("images", "again"))
    assert np.abs(one - other).max() <= 1


@pytest.mark.slow
def test_decoding_on_a_worker_ends_ray_with_the_command(tmp_path: Path, vae: str) -> None:
    import ray

    if ray.is_initialized():
        pytest.skip("another test holds a cluster")
    source = table(tmp_path / "latents", latents={"vae": vae, "scaling_factor": 0.2})
    assert sims("data", "decode", source, tmp_path / "images", "--workers", "1", "--gpus", "0") == 0
    assert len(SampleTable(tmp_path / "images")) == 5 and not ray.is_initialized()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "does not say how its latents relate to pixels; give --vae"),
        (("--vae", "models/of/mine"), "there is no folder models/of/mine"),
        (("--vae", "{vae}", "--latents", "{{scaling_factor: 0}}"), "--latents: latents.scaling_factor"),
        (("--vae", "{vae}", "--latents", "edm3"), "--latents: latents is 'edm3'"),
    ],
)
def test_a_mistake_in_decoding_gets_one_sentence(
    words: tuple[str, ...], reason: str, tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "latents")
    assert sims("data", "decode", source, tmp_path / "out", *(word.format(vae=vae) for word in words)) == 1
    assert reason in refused(capsys) and not (tmp_path / "out").exists()


# --- previews


def sampled(tmp_path: Path, *words: str | Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Two images that `sims sample` writes, [2, H, W, C]."""
    assert sims("sample", tmp_path / "out", *words, "--n", "2", "--seed", "5", "--steps", "3") == 0
    return np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").iterdir())])


def expected(space: LatentSpace) -> np.ndarray[Any, np.dtype[np.uint8]]:
    made = next(generate(small_network(img_channels=4), (4, 8, 8), range(5, 7), SCHEDULE, latents=True))
    return LatentDecoder(space).decode(made.images).numpy().transpose(0, 2, 3, 1)


def test_a_model_of_latents_is_sampled_as_images_by_its_card(tmp_path: Path, vae: str) -> None:
    entry = {"vae": vae, "scaling_factor": 0.3, "shift": 0.1}
    images = sampled(tmp_path, "--base", model(tmp_path / "a.safetensors", latents=entry))
    assert images.shape == (2, 32, 32, 3)
    assert np.array_equal(images, expected(LatentSpace.of(entry, "x")))


def test_options_of_sample_go_before_the_card(tmp_path: Path, vae: str) -> None:
    base = model(tmp_path / "a.safetensors", latents={"vae": "nowhere/at-all", "scaling_factor": 0.3})
    images = sampled(tmp_path, "--base", base, "--vae", vae, "--latents", "edm2")
    assert np.array_equal(images, expected(LatentSpace.of({**EDM2, "vae": vae}, "x")))


def test_a_vae_alone_decodes_a_model_that_says_nothing(tmp_path: Path, vae: str) -> None:
    images = sampled(tmp_path, "--base", model(tmp_path / "a.safetensors"), "--vae", vae)
    assert np.array_equal(images, expected(LatentSpace(vae, (0.18215,), (0.0,))))


def test_a_model_imported_before_cards_had_latents_is_decoded_as_edm2(tmp_path: Path, vae: str) -> None:
    base = model(tmp_path / "a.safetensors", encoder="StabilityVAEEncoder")
    images = sampled(tmp_path, "--base", base, "--vae", vae)
    assert np.array_equal(images, expected(LatentSpace.of({**EDM2, "vae": vae}, "x")))


EDM2 = {
    "raw_mean": [5.81, 3.25, 0.12, -2.15],
    "raw_std": [4.17, 4.62, 3.71, 3.28],
    "final_std": 0.5,
    "pixel_range": [0, 1],
    "rounding": "down",
}


@pytest.mark.parametrize(
    ("card", "words", "reason"),
    [
        ({}, (), "makes 4 channels, not grey or RGB images, and its card does not say how to decode them"),
        ({"latents": {"vae": "{vae}"}}, (), "a.safetensors: latents.scaling_factor"),
        ({}, ("--vae", "{wide}"), "the latents have 4 channels, but the VAE"),
        ({}, ("--latents", "edm2", "--vae", "nowhere/to/be"), "there is no folder nowhere/to/be"),
    ],
)
def test_a_mistake_in_sampling_latents_gets_one_sentence(
    card: dict[str, Any],
    words: tuple[str, ...],
    reason: str,
    tmp_path: Path,
    vae: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = save_vae(tmp_path / "wide", latent_channels=8)
    options = [word.format(vae=vae, wide=wide) for word in words]
    assert sims("sample", tmp_path / "o.png", "--base", model(tmp_path / "a.safetensors", **card), *options) == 1
    assert reason in refused(capsys) and not (tmp_path / "o.png").exists()


def test_a_model_of_images_is_sampled_without_a_vae(tmp_path: Path) -> None:
    path = tmp_path / "grey.safetensors"
    save_tensors(path, small_network().state_dict(), {"role": "base", "network": SETTINGS})
    assert sampled(tmp_path, "--base", path).shape == (2, 8, 8)


def test_latents_that_are_not_finite_are_named_by_their_seed(
    tmp_path: Path, vae: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: torch.full_like(t, torch.nan) for name, t in small_network(img_channels=4).state_dict().items()}
    card = {"role": "base", "network": NETWORK, "latents": {"vae": vae, "scaling_factor": 1.0}}
    save_tensors(tmp_path / "nan.safetensors", weights, card)
    words = ("--base", tmp_path / "nan.safetensors", "--seed", "9", "--steps", "2")
    assert sims("sample", tmp_path / "o.png", *words) == 1
    assert "the image or latent of seed 9 has values that are not finite" in refused(capsys)


def test_a_vae_of_other_channels_is_refused_before_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = save_vae(tmp_path / "wide", latent_channels=8)
    weights = {name: torch.full_like(t, torch.nan) for name, t in small_network(img_channels=4).state_dict().items()}
    save_tensors(tmp_path / "nan.safetensors", weights, {"role": "base", "network": NETWORK})
    assert sims("sample", tmp_path / "o.png", "--base", tmp_path / "nan.safetensors", "--vae", wide) == 1
    assert "the latents have 4 channels" in refused(capsys)
