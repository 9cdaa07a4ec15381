"""How latents relate to pixels, and where the VAE comes from; the VAEs are real ones of a few channels."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sims_ray.config import preset_network
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from sims_ray.errors import SimsError
from sims_ray.nn.networks import describe_network
from sims_ray.storage.checkpoints import read_card, save_tensors
from sims_ray.storage.conversion import convert_checkpoint, merge_checkpoints
from sims_ray.storage.latents import (
    EDM2_LATENTS,
    LatentSpace,
    card_latents,
    choose_latents,
)
from sims_ray.storage.vae import VaeFiles, _autoencoder
from tests.networks import SETTINGS, small_network

STOCK = {"vae": "v", "scaling_factor": 0.25, "shift": 2.0}
ONE_STEP = {"num_steps": 1, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "solver": "euler"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_vae(folder: Path, seed: int = 0, **settings: Any) -> str:
    """Save a VAE with random weights that makes 16x16 RGB images of 4x4 latents; returns its folder."""
    pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = _autoencoder()(
        **{**blocks, "block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, **settings}
    )
    vae.save_pretrained(folder)
    return str(folder)


def images(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def sentence(error: pytest.ExceptionInfo[SimsError]) -> str:
    text = str(error.value)
    assert "\n" not in text and "; " in text
    return text


# --- latents and pixels


@pytest.mark.parametrize("entry", [EDM2_LATENTS, STOCK], ids=["statistics", "factor"])
def test_raw_latents_come_back_from_final_ones(entry: dict[str, Any]) -> None:
    space, raw = LatentSpace.of(entry, "x"), 5 * torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(space.to_raw(space.to_final(raw)), raw, rtol=1e-5, atol=1e-5)
    assert space.to_raw(space.to_final(raw).half()).dtype == torch.float32


def test_statistics_bring_each_channel_to_the_final_mean_and_deviation() -> None:
    entry = {**EDM2_LATENTS, "final_mean": 0.1}
    space = LatentSpace.of(entry, "x")
    for channel, (mean, std) in enumerate(zip(EDM2_LATENTS["raw_mean"], EDM2_LATENTS["raw_std"], strict=True)):
        raw = torch.tensor([mean, mean + std, mean - 2 * std]).reshape(3, 1, 1, 1).expand(3, 4, 1, 1)
        torch.testing.assert_close(space.to_final(raw)[:, channel].flatten(), torch.tensor([0.1, 0.6, -0.9]))


def test_a_factor_scales_what_is_left_after_the_shift() -> None:
    final = LatentSpace.of(STOCK, "x").to_final(images(2.0, 6.0))
    assert final.flatten().tolist() == [0.0, 1.0]


def test_black_and_white_lie_at_the_ends_of_the_pixel_range_and_no_value_beyond() -> None:
    for entry, values in ((EDM2_LATENTS, (0.0, 1.0, -3.0, 7.0)), (STOCK, (-1.0, 1.0, -3.0, 7.0))):
        assert LatentSpace.of(entry, "x").to_uint8(images(*values)).flatten().tolist() == [0, 255, 0, 255]


def test_pixels_are_rounded_to_the_nearest_level_or_down_as_edm2_does() -> None:
    values = torch.rand(1, 3, 9, 9)
    down = LatentSpace.of(EDM2_LATENTS, "x").to_uint8(values)
    assert torch.equal(down, (values * 255).floor().to(torch.uint8))
    near = LatentSpace.of({**EDM2_LATENTS, "rounding": "nearest"}, "x").to_uint8(values)
    assert torch.equal(near, (values * 255).round().to(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"raw_std": [1, 2, 0, 4]}, r"latents.raw_std.2 is not possible"),
        ({"raw_std": [1, 2, 3]}, "latents.raw_mean has 4 values, raw_std 3"),
        ({"raw_mean": ["a"]}, "latents.raw_mean.0"),
        ({"raw_mean": [float("nan")] * 4}, "latents.raw_mean.0"),
        ({"final_std": -1}, "latents.final_std"),
        ({"pixel_range": [1, 0]}, "latents.pixel_range is"),
        ({"pixel_range": [0]}, "latents.pixel_range"),
        ({"rounding": "up"}, "latents.rounding"),
        ({"vae": ""}, "latents.vae"),
        ({"vae": None}, "latents.vae"),
        ({"sclae": 1}, "latents.sclae"),
        ({"raw_std": []}, "latents.raw_std"),
    ],
)
def test_an_entry_that_is_not_possible_is_refused_by_the_name_of_its_value(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SimsError, match=reason) as error:
        LatentSpace.of({**EDM2_LATENTS, **changes}, "a.safetensors")
    assert sentence(error).startswith("a.safetensors: ")


def test_sampled_latents_are_the_samplers_own_values_in_half_precision() -> None:
    net, schedule = small_network(img_channels=4), {"num_steps": 3, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    batches = list(generate(net, (4, 8, 8), range(3, 8), schedule, batch_size=2, latents=True))
    for batch in batches:
        noise = SeedStreams(batch.seeds).randn((4, 8, 8), torch.float32, "cpu")
        with torch.inference_mode():
            made = heun_sampler(net, noise, sigmas=sigma_schedule(**schedule)).images
        assert batch.images.dtype == torch.float16 and torch.equal(batch.images, made.half())
    assert max(float(batch.images.abs().max()) for batch in batches) > 1  # pixels would end there


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_sampled_latent_that_float16_cannot_hold_is_named_by_its_seed(value: float) -> None:
    calls = iter([0.0, value])

    def denoiser(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        estimate = torch.zeros_like(x)
        estimate[-1, 0, 0, 0] = next(calls)  # of the last seed of each batch
        return estimate

    batches = generate(denoiser, (1, 2, 2), range(10, 16), ONE_STEP, batch_size=3, latents=True)
    assert next(batches).images.isfinite().all()
    with pytest.raises(ValueError, match="the image or latent of seed 15 has values that are not finite"):
        next(batches)


# --- where it is said


def test_the_card_of_a_model_with_edm2s_encoder_means_edm2s_latents() -> None:
    network = {"network": {"img_channels": 4}}
    assert card_latents({**network, "encoder": "StabilityVAEEncoder"}) == EDM2_LATENTS
    assert card_latents({**network, "encoder": "StandardRGBEncoder"}) is None
    assert card_latents({"network": {"img_channels": 3}, "encoder": "StabilityVAEEncoder"}) is None
    assert card_latents({**network, "encoder": "StabilityVAEEncoder", "latents": STOCK}) == STOCK


def test_what_the_user_says_goes_before_what_is_stored() -> None:
    assert choose_latents(STOCK, None, None, "t").vae == "v"
    assert choose_latents(STOCK, None, "w", "t") == LatentSpace.of({**STOCK, "vae": "w"}, "t")
    assert choose_latents(STOCK, "edm2", None, "t") == LatentSpace.of(EDM2_LATENTS, "t")
    given = choose_latents(STOCK, "{scaling_factor: 3, pixel_range: [0, 2]}", "w", "t")
    assert (given.scale, given.bias, given.pixel_range, given.vae) == ((3.0,), (0.0,), (0.0, 2.0), "w")


def test_a_vae_alone_brings_its_own_scaling(tmp_path: Path) -> None:
    folder = save_vae(tmp_path / "vae", scaling_factor=0.5, shift_factor=0.25)
    assert choose_latents(None, None, folder, "t") == LatentSpace(folder, (0.5,), (-0.125,), (-1, 1), "nearest")
    means = {"latents_mean": [1, 2, 3, 4], "latents_std": [1, 1, 2, 2]}
    folder = save_vae(tmp_path / "other", scaling_factor=0.5, **means)
    assert choose_latents(None, None, folder, "t").scale == (0.5, 0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("stored", "given", "reason"),
    [
        (None, None, "t does not say how its latents relate to pixels"),
        (None, "{scaling_factor: 1}", "--latents: latents.vae"),
        (None, "[1", "is not YAML"),
        (None, "nonsense", "--latents: latents is 'nonsense'"),
        ({"vae": "v"}, None, "t: latents.scaling_factor"),
        ("v", None, "t: latents is 'v'"),
    ],
)
def test_what_is_not_said_or_not_possible_gets_one_sentence(stored: Any, given: str | None, reason: str) -> None:
    with pytest.raises(SimsError, match=reason.replace("[", r"\[")) as error:
        choose_latents(stored, given, None, "t")
    sentence(error)


def test_a_state_dict_of_a_latent_preset_gets_the_entry(tmp_path: Path) -> None:
    tensors = describe_network(preset_network("edm2-img512-xxs")).state_dict()
    # One zero seen as many, so that the file is small.
    torch.save({name: torch.zeros(()).half().expand(t.shape) for name, t in tensors.items()}, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors", "float16", "edm2-img512-xxs")
    assert read_card(tmp_path / "a.safetensors")["latents"] == EDM2_LATENTS


def test_a_merged_and_a_converted_model_have_the_latents_of_the_base(tmp_path: Path) -> None:
    card = {"role": "base", "network": {**SETTINGS, "img_channels": 4}, "latents": STOCK}
    base, aux = tmp_path / "base.safetensors", tmp_path / "aux.safetensors"
    save_tensors(base, small_network(0, img_channels=4).state_dict(), card)
    save_tensors(aux, small_network(1, img_channels=4).state_dict(), {**card, "role": "auxiliary"})
    assert merge_checkpoints(base, aux, tmp_path / "neon.safetensors", 1.0)["latents"] == STOCK
    convert_checkpoint(base, tmp_path / "half.safetensors", "float16", None)
    assert read_card(tmp_path / "half.safetensors")["latents"] == STOCK


# --- the VAE's files


def test_a_vae_is_known_by_its_weights_and_architecture_and_not_by_where_it_lies_or_who_wrote_it(
    tmp_path: Path,
) -> None:
    first, again, other = (save_vae(tmp_path / n, seed) for n, seed in (("a", 0), ("b", 0), ("c", 1)))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.0"}))
    identity = VaeFiles.find(first).identity
    assert VaeFiles.find(again).identity == identity
    assert VaeFiles.find(other).identity != identity
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "act_fn": "relu"}))
    assert VaeFiles.find(again).identity != identity


def test_image_shapes_follow_from_the_architecture_and_other_channels_are_refused(tmp_path: Path) -> None:
    files = VaeFiles.find(save_vae(tmp_path / "vae"))
    assert files.image_shape((4, 4, 6)) == (3, 16, 24)
    with pytest.raises(SimsError, match=r"have 3 channels, but the VAE in .* takes 4") as error:
        files.image_shape((3, 4, 4))
    sentence(error)


def break_vae(folder: Path, how: str) -> None:
    config, weights = folder / "config.json", folder / WEIGHTS
    if how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "config is no JSON":
        config.write_text("{")
    elif how == "another class":
        config.write_text(config.read_text().replace("AutoencoderKL", "AutoencoderTiny"))
    elif how == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "another architecture":
        config.write_text(config.read_text().replace('"latent_channels": 4', '"latent_channels": 5'))
    elif how == "a tensor is missing":
        tensors = load_file(weights)
        save_file(dict(list(tensors.items())[1:]), weights)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no weights", f"has no {WEIGHTS}"),
        ("no config", "has no config.json"),
        ("config is no JSON", "does not describe a network"),
        ("another class", "of the class AutoencoderTiny, not AutoencoderKL"),
        ("torn", "cannot be loaded"),
        ("another architecture", "cannot be loaded"),
        ("a tensor is missing", "does not fit its config.json at"),
    ],
)
def test_broken_files_of_a_vae_get_one_sentence(tmp_path: Path, how: str, reason: str) -> None:
    folder = save_vae(tmp_path / "vae")
    break_vae(tmp_path / "vae", how)
    with pytest.raises(SimsError, match=reason) as error:
        VaeFiles.find(folder).load()
    assert folder in sentence(error)


def test_a_path_that_is_no_folder_gets_one_sentence() -> None:
    with pytest.raises(SimsError, match="there is no folder models/of/mine; give --vae FOLDER") as error:
        VaeFiles.find("models/of/mine")
    sentence(error)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of a hub that does not answer."""
    pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of `discard`: nobody listens
    return tmp_path / "hub"


def cached_vae(hub: Path) -> Path:
    repository = hub / "models--me--vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(save_vae(repository / "snapshots" / ("0" * 40)))


def test_without_the_hub_a_cached_vae_is_used(hub: Path) -> None:
    folder = cached_vae(hub)
    assert VaeFiles.find("me/vae").identity == VaeFiles.find(str(folder)).identity


@pytest.mark.parametrize("half_fetched", [False, True])
def test_without_the_hub_a_vae_that_is_not_cached_gets_one_sentence_with_the_way_out(
    hub: Path, half_fetched: bool
) -> None:
    if half_fetched:
        (cached_vae(hub) / WEIGHTS).unlink()
    with pytest.raises(SimsError, match=r"me/vae is neither a folder nor in the cache.* give --vae FOLDER") as error:
        VaeFiles.find("me/vae")
    sentence(error)


def test_without_diffusers_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = VaeFiles.find(save_vae(tmp_path / "vae"))
    for name in ("diffusers", "diffusers.utils.import_utils", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    for act in (files.load, lambda: VaeFiles.find("me/vae")):
        with pytest.raises(SimsError, match=r"pip install 'sims-ray\[diffusers\]'") as error:
            act()
        sentence(error)
