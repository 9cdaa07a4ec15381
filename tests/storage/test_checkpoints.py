from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sims_ray.errors import SimsError
from sims_ray.storage.checkpoints import (
    load_model,
    load_tensors,
    newest_state,
    save_model,
    save_tensors,
    state_path,
)
from tests.networks import SETTINGS, small_network

CARD = {"role": "base", "network": SETTINGS, "nimg": 150_000, "parents": ["a", "b"]}


def assert_one_sentence(error: pytest.ExceptionInfo[SimsError], path: Path) -> None:
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message


def test_a_model_and_its_card_come_back_bit_for_bit(tmp_path: Path) -> None:
    path, net = tmp_path / "model.safetensors", small_network()
    save_model(path, net, CARD)
    loaded, card = load_model(path)
    assert card == CARD
    expected, actual = net.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 3.0])
    assert torch.equal(loaded(x, sigma), net(x, sigma))


def test_a_loaded_model_is_ready_for_inference(tmp_path: Path) -> None:
    save_model(tmp_path / "model.safetensors", small_network().train().requires_grad_(True), CARD)
    loaded, _ = load_model(tmp_path / "model.safetensors")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3).half(),
        "double": torch.randn(2, 3, dtype=torch.float64),
        "scalar": torch.tensor(7.0),
        "transposed": torch.randn(3, 4).T,
        "empty": torch.zeros(0, 3),
        "uint8": torch.arange(5, dtype=torch.uint8),
    }
    save_tensors(tmp_path / "x.safetensors", tensors, {"role": "test"})
    loaded, card = load_tensors(tmp_path / "x.safetensors")
    assert card == {"role": "test"}
    assert loaded.keys() == tensors.keys()
    assert all(loaded[k].dtype == v.dtype and torch.equal(loaded[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("percent", [0, 50, 99])
def test_a_truncated_file_is_refused_in_one_sentence_that_names_it(tmp_path: Path, percent: int) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, small_network(), CARD)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * percent // 100])
    with pytest.raises(SimsError, match="is not a checkpoint of sims_ray") as error:
        load_model(path)
    assert_one_sentence(error, path)


def test_what_is_no_checkpoint_is_refused_in_one_sentence_that_names_it(tmp_path: Path) -> None:
    text, pickled, foreign = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    text.write_text("hello, I am not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, pickled)
    save_file({"weights": torch.zeros(3)}, foreign)
    for path in (text, pickled, foreign):
        with pytest.raises(SimsError, match="is not a checkpoint of sims_ray") as error:
            load_tensors(path)
        assert_one_sentence(error, path)


def test_a_missing_file_is_refused_in_one_sentence_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SimsError, match="no checkpoint at") as error:
        load_model(tmp_path / "absent.safetensors")
    assert_one_sentence(error, tmp_path / "absent.safetensors")


def test_a_training_state_is_refused_as_a_model(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"x": torch.zeros(1)}, {"role": "training state"})
    with pytest.raises(SimsError, match="holds a training state, not a denoiser") as error:
        load_model(path)
    assert_one_sentence(error, path)


def test_weights_that_do_not_fit_their_card_are_refused_in_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, small_network(), {**CARD, "network": {**SETTINGS, "model_channels": 16}})
    with pytest.raises(SimsError, match="does not fit the network of its own card") as error:
        load_model(path)
    assert_one_sentence(error, path)


def test_the_newest_state_is_the_one_of_most_images(tmp_path: Path) -> None:
    assert newest_state(tmp_path) is None
    for nimg in (900_000, 1_000_000, 5_000):
        save_tensors(state_path(tmp_path, nimg), {"x": torch.tensor([nimg])}, {"nimg": nimg})
    found = newest_state(tmp_path)
    assert found is not None
    assert found[1]["nimg"] == found[0]["x"].item() == 1_000_000


@pytest.mark.parametrize("percent", [0, 50, 99])
def test_a_torn_newest_state_is_passed_over_for_the_one_before(tmp_path: Path, percent: int) -> None:
    for nimg in (1000, 2000):
        save_tensors(state_path(tmp_path, nimg), {"x": torch.randn(100)}, {"nimg": nimg})
    newest = state_path(tmp_path, 2000)
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) * percent // 100])
    (tmp_path / "state-notes.safetensors").write_text("someone's file")
    found = newest_state(tmp_path)
    assert found is not None
    assert found[1]["nimg"] == 1000
    state_path(tmp_path, 1000).unlink()
    assert newest_state(tmp_path) is None


def test_saving_leaves_no_other_file_behind(tmp_path: Path) -> None:
    for _ in range(2):
        save_model(tmp_path / "model.safetensors", small_network(), CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
