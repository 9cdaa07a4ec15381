import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.storage.checkpoints import (
    DTYPES,
    CorruptFile,
    load_model,
    load_tensors,
    read_card,
    save_model,
    save_tensors,
    verify_tensors,
)
from tests.networks import SETTINGS, small_network

CARD = {"role": "base", "network": SETTINGS, "nimg": 150_000, "parents": ["a", "b"]}


def assert_one_sentence(error: pytest.ExceptionInfo[SimsError], path: Path) -> None:
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message


def every_kind() -> dict[str, Tensor]:
    """Tensors of every dtype, in an order that is not that of the file."""
    return {str(dtype): torch.tensor([[0, 1, 2], [1, 0, 1]]).to(dtype) for dtype in DTYPES}


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits agree."""
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in ((one[name], other[name]) for name in one)
    )


def with_byte(path: Path, position: int, flip: int) -> None:
    """Flip bits of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= flip
    path.write_bytes(content)


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


def test_saving_leaves_no_other_file_behind(tmp_path: Path) -> None:
    for _ in range(2):
        save_model(tmp_path / "model.safetensors", small_network(), CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_dtype_of_the_format_comes_back_and_the_library_reads_the_same(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", every_kind()
    save_tensors(path, tensors, {"role": "test"})
    assert same_bytes(load_tensors(path)[0], tensors)
    assert same_bytes(load_file(path), tensors)


@pytest.mark.parametrize("name_chars", range(1, 5))
def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path, name_chars: int) -> None:
    tensors = {"x" * name_chars: torch.zeros(1, dtype=torch.uint8), **every_kind()}
    save_tensors(tmp_path / "x.safetensors", tensors, {})
    content = (tmp_path / "x.safetensors").read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    for name, tensor in tensors.items():
        assert (data + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_what_the_format_has_no_name_for_is_refused_in_one_sentence_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(SimsError, match=r"tensor b is torch\.complex128") as error:
        save_tensors(path, {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.complex128)}, {})
    assert_one_sentence(error, path)
    assert list(tmp_path.iterdir()) == []


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tensors, card = every_kind(), {"role": "test", "nimg": 3}
    for i in range(4):
        ordered = dict(sorted(tensors.items(), reverse=i % 2 == 1))
        save_tensors(tmp_path / f"{i}", ordered, dict(sorted(card.items(), reverse=i % 2 == 1)))
    assert len({(tmp_path / f"{i}").read_bytes() for i in range(4)}) == 1


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_one_changed_byte_anywhere_is_one_sentence_or_changes_nothing(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "x.safetensors"
    tensors, card = {"weight": torch.randn(2, 3).bfloat16(), "step": torch.tensor([7])}, {"role": "é", "nimg": 1000}
    save_tensors(path, tensors, card)
    content = path.read_bytes()
    data = len(content) - sum(tensor.nbytes for tensor in tensors.values())
    key = content.index(b"sha256")
    padding = content[:data].rstrip(b" ")
    harmless = {
        *range(key, key + len("sha256")),
        *range(len(padding), data),
    }  # the digest's own name, spaces at the end
    for position in range(len(content)):
        with_byte(path, position, flip)
        try:
            loaded, its_card = load_tensors(path)
            assert position in harmless
            assert same_bytes(loaded, tensors)
            assert its_card == card
        except CorruptFile as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            assert error.reason in str(error)
            with pytest.raises(CorruptFile):
                verify_tensors(path)
        path.write_bytes(content)


def test_a_changed_value_is_told_by_both_digests(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, small_network(), CARD)
    with safe_open(path, framework="pt") as file:
        digest = file.metadata()["sha256"]
    with_byte(path, -1, 0x01)
    with pytest.raises(SimsError, match=rf"content has SHA-256 [0-9a-f]{{12}}..., its header says {digest[:12]}...\)"):
        load_model(path)


def test_a_digest_covers_what_lies_between_names_dtypes_and_shapes(tmp_path: Path) -> None:
    zeros, digests = torch.zeros(4, 2), set()
    contents = [
        {"a": zeros}, {"b": zeros}, {"a": zeros.T}, {"a": zeros.int()}, {"a": zeros[:2], "b": zeros[2:]},
        {"a": zeros[:1], "b": zeros[1:]},
    ]  # fmt: skip
    for tensors in contents:
        save_tensors(tmp_path / "x", tensors, {})
        with safe_open(tmp_path / "x", framework="pt") as file:
            digests.add(file.metadata()["sha256"])
    assert len(digests) == len(contents)


def test_a_file_without_a_digest_is_accepted(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", every_kind()
    save_file(tensors, path, metadata={"card": json.dumps({"role": "test"}), "format": "pt"})
    loaded, card = load_tensors(path)
    assert same_bytes(loaded, tensors)
    assert card == verify_tensors(path) == {"role": "test"}


@pytest.mark.parametrize("card", [None, "", "{", "[1]", '"role"', "null"])
def test_a_card_that_is_none_is_refused_in_one_sentence_that_names_the_file(tmp_path: Path, card: str | None) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=None if card is None else {"card": card})
    for read in (load_tensors, verify_tensors, read_card):
        with pytest.raises(CorruptFile, match="is not a checkpoint of sims_ray") as error:
            read(path)
        assert_one_sentence(error, path)


def test_a_card_is_read_without_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.zeros(9)}, {"role": "test"})
    with_byte(path, -1, 0x01)
    assert read_card(path) == {"role": "test"}


def test_what_cannot_be_read_is_not_called_torn(tmp_path: Path) -> None:
    folder = tmp_path / "x.safetensors"
    folder.mkdir()
    with pytest.raises(SimsError, match="cannot be read") as error:
        load_tensors(folder)
    assert not isinstance(error.value, CorruptFile)
    assert_one_sentence(error, folder)


def test_what_cannot_be_written_is_one_sentence_and_the_file_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.zeros(9)}, {"role": "first"})

    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SimsError, match=r"needs 36 bytes and [\d,]+ bytes are free; free space") as error:
        save_tensors(path, {"x": torch.ones(9)}, {"role": "second"})
    assert_one_sentence(error, tmp_path)
    assert load_tensors(path)[1] == {"role": "first"}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SimsError, match="cannot be written") as error:
        save_tensors(path / "in a file.safetensors", {"x": torch.ones(9)}, {})
    assert_one_sentence(error, path)


def test_a_file_is_for_all_whom_the_folder_lets_read(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_wrong_with_a_file_is_known_in_another_process_too(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(CorruptFile) as error:
        load_tensors(tmp_path / "x")
    sent = pickle.loads(pickle.dumps(error.value))
    assert (str(sent), sent.reason) == (str(error.value), "it is empty")
