from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.nn.networks import describe_network, trainable_parameters
from sims_ray.storage.checkpoints import load_model, load_tensors, read_card, save_model, save_tensors
from sims_ray.storage.posthoc import PATTERN, average_path, power_ema, reconstruct, save_average
from tests.networks import ARCHITECTURES, SETTINGS, small_network

# Random frequencies are a buffer that float16 would spoil.
NETWORK = {**SETTINGS, **ARCHITECTURES["ncsnpp"]}
CARD: dict[str, Any] = {"role": "base", "network": NETWORK, "parents": ["a"], "precision": "float16"}
STDS = (0.05, 0.1)
ENDS = (1_000, 2_000, 3_000)
HALF = 2.0**-11  # relative rounding error of float16


@cache
def buffer_names() -> set[str]:
    return {name for name, _ in describe_network(NETWORK).named_buffers()}


@cache
def weights_at(nimg: int, std: float) -> dict[str, Tensor]:
    """Some network's tensors: other weights at each end and width, other buffers at each end."""
    weights = small_network(seed=nimg + round(1000 * std), **ARCHITECTURES["ncsnpp"]).state_dict()
    buffers = small_network(seed=nimg, **ARCHITECTURES["ncsnpp"]).state_dict()
    return {name: (buffers if name in buffer_names() else weights)[name] for name in weights}


@pytest.fixture(scope="module")
def averages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six stored averages of one run."""
    folder = tmp_path_factory.mktemp("averages")
    for nimg in ENDS:
        for std in STDS:
            save_average(folder, nimg, std, weights_at(nimg, std), CARD)
    return sorted(folder.glob(PATTERN))


def test_an_average_is_stored_under_its_end_and_width_with_its_card(averages: list[Path]) -> None:
    assert averages == sorted(average_path(averages[0].parent, nimg, std) for nimg in ENDS for std in STDS)
    card = read_card(average_path(averages[0].parent, 2_000, 0.1))
    assert card == {**CARD, "role": "average", "nimg": 2_000, "ema": {"kind": "power", "std": 0.1}}


def test_weights_are_stored_in_float16_and_buffers_bit_for_bit(averages: list[Path]) -> None:
    stored, exact = load_tensors(averages[0])[0], weights_at(1_000, 0.05)
    assert stored.keys() == exact.keys()
    for name, tensor in exact.items():
        expected = tensor if name in buffer_names() else tensor.to(torch.float16)
        assert stored[name].dtype == expected.dtype
        assert torch.equal(stored[name], expected), name
    freqs = exact["model.map_noise.freqs"]
    assert not torch.equal(freqs.half().float(), freqs)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("nimg", [*ENDS, None])
def test_a_reconstructed_stored_average_is_that_one_to_float16(
    averages: list[Path], nimg: int | None, std: float
) -> None:
    tensors, _ = reconstruct(averages, std, nimg)
    for name, expected in weights_at(nimg or ENDS[-1], std).items():
        assert tensors[name].dtype == torch.float32
        torch.testing.assert_close(tensors[name], expected, rtol=2 * HALF, atol=1e-6)


@pytest.mark.parametrize("nimg", [2_000, 3_000])
def test_buffers_are_those_of_the_last_average_bit_for_bit(averages: list[Path], nimg: int) -> None:
    tensors, _ = reconstruct(averages, 0.07, nimg)
    expected = weights_at(nimg, STDS[-1])
    for name in buffer_names():
        assert torch.equal(tensors[name], expected[name]), name
    assert any(name.endswith("freqs") for name in buffer_names())


def test_averages_of_weights_that_never_moved_reconstruct_them_at_any_width(tmp_path: Path) -> None:
    exact = weights_at(1_000, 0.1)
    for nimg in ENDS[:2]:
        for stored_std in STDS:
            save_average(tmp_path, nimg, stored_std, exact, CARD)
    for std in (0.03, 0.07, 0.25):
        tensors, _ = reconstruct(list(tmp_path.glob(PATTERN)), std)
        for name, expected in exact.items():
            torch.testing.assert_close(tensors[name], expected, rtol=2 * HALF, atol=1e-5)


def test_a_reconstruction_does_not_depend_on_the_order_of_the_files(averages: list[Path]) -> None:
    forwards, backwards = reconstruct(averages, 0.07)[0], reconstruct(averages[::-1], 0.07)[0]
    for name, tensor in forwards.items():
        torch.testing.assert_close(tensor, backwards[name], rtol=1e-5, atol=1e-5)


def test_averages_that_end_later_take_no_part(averages: list[Path]) -> None:
    alone = reconstruct([path for path in averages if "3000" not in path.name], 0.07)[0]
    among_later = reconstruct(averages, 0.07, 2_000)[0]
    assert all(torch.equal(alone[name], tensor) for name, tensor in among_later.items())
    last = reconstruct(averages, 0.07)[0]
    assert not torch.equal(last["model.map_layer0.weight"], alone["model.map_layer0.weight"])


def test_a_reconstruction_is_a_checkpoint_of_its_network(averages: list[Path], tmp_path: Path) -> None:
    tensors, card = reconstruct(averages, 0.07)
    assert card == {**CARD, "role": "average", "nimg": 3_000, "ema": power_ema(0.07)}
    save_tensors(tmp_path / "model.safetensors", tensors, card)
    net, loaded_card = load_model(tmp_path / "model.safetensors")
    assert loaded_card == card
    assert net(torch.randn(1, 1, 8, 8), torch.tensor([1.0])).isfinite().all()


# --- refusals


def refusal(paths: list[Path], std: float = 0.07, nimg: int | None = None) -> str:
    with pytest.raises(SimsError) as error:
        reconstruct(paths, std, nimg)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_no_files_are_refused() -> None:
    assert "no stored averages" in refusal([])


@pytest.mark.parametrize("std", [-0.1, 0.0, 0.3])
def test_a_width_that_does_not_exist_is_refused_with_the_folder(averages: list[Path], std: float) -> None:
    message = refusal(averages, std)
    assert f"relative width {std:g} does not exist" in message
    assert str(averages[0].parent) in message


@pytest.mark.parametrize(
    ("nimg", "near"), [(1, "1,000 and 2,000"), (2_600, "3,000 and 2,000"), (9_999, "3,000 and 2,000")]
)
def test_an_end_at_which_no_average_is_stored_is_refused_with_the_nearest(
    averages: list[Path], nimg: int, near: str
) -> None:
    with pytest.raises(SimsError, match=f"no stored average ends at {nimg:,} images; the nearest end at {near}"):
        reconstruct(averages, 0.07, nimg)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nimg": 1_000, "ema": {"kind": "halflife", "kimg": 500, "rampup_ratio": 0.05}},
        {"nimg": 1_000},
        {"ema": {"kind": "power", "std": 0.1}},
    ],
    ids=["a half-life", "no average", "no end"],
)
def test_a_file_that_is_no_power_function_average_is_refused_by_name(
    averages: list[Path], tmp_path: Path, wrong: dict[str, Any]
) -> None:
    path = tmp_path / "other.safetensors"
    save_model(path, small_network(**ARCHITECTURES["ncsnpp"]), {**CARD, **wrong})
    assert f"{path} is not a power-function average" in refusal([*averages, path])


def test_averages_of_different_networks_are_refused_by_name(averages: list[Path], tmp_path: Path) -> None:
    other = {**NETWORK, "model_channels": 16}
    net = small_network(**{**ARCHITECTURES["ncsnpp"], "model_channels": 16})
    (tmp_path / "other").mkdir()
    save_average(tmp_path / "other", 2_500, 0.05, net.state_dict(), {**CARD, "network": other})
    [path] = (tmp_path / "other").glob(PATTERN)
    message = refusal([*averages, path])
    assert "hold different networks" in message
    assert str(averages[-1]) in message


def test_the_order_in_which_averages_are_given_does_not_change_a_bit(averages: list[Path]) -> None:
    expected = reconstruct(averages, 0.08)[0]
    for order in (averages[::-1], averages[1::2] + averages[::2]):
        found = reconstruct(order, 0.08)[0]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_same_average_from_two_folders_is_refused(averages: list[Path], tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    save_average(tmp_path / "again", 2_000, 0.1, weights_at(2_000, 0.1), CARD)
    assert "given twice" in refusal([*averages, *(tmp_path / "again").glob(PATTERN)])


def test_missing_and_torn_files_are_refused_by_name(averages: list[Path], tmp_path: Path) -> None:
    missing = tmp_path / "average-000000004000-0.100.safetensors"
    assert str(missing) in refusal([*averages, missing])
    torn = tmp_path / averages[0].name
    content = averages[0].read_bytes()
    torn.write_bytes(content[: len(content) // 2])
    assert str(torn) in refusal([torn, *averages[1:]])


@pytest.mark.parametrize("resolution", [0, 8])
def test_what_does_not_train_is_stored_and_reconstructed_bit_for_bit(resolution: int, tmp_path: Path) -> None:
    net = small_network(0, **ARCHITECTURES["ncsnpp"])
    card = {**CARD, "trainable": "decoder", "optimization": {"trainable_resolution": resolution}}
    for nimg in ENDS:
        for std in STDS:
            save_average(tmp_path, nimg, std, net.state_dict(), card)
    tensors, _ = reconstruct(list(tmp_path.glob(PATTERN)), 0.07)
    trained = trainable_parameters(net, "decoder", resolution)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensors[name], tensor) or name in trained, name
    assert any(not torch.equal(tensors[name], net.state_dict()[name]) for name in trained)
