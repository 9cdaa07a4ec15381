from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sims_ray.storage.artifacts import MANIFEST, Store
from sims_ray.storage.checkpoints import load_tensors, save_tensors
from sims_ray.storage.posthoc import average_path, save_average
from tests.cli.words import sims
from tests.networks import SETTINGS, small_network
from tests.storage import standin

CARD = {"role": "base", "network": SETTINGS, "nimg": 1000, "licence": "CC BY-NC-SA 4.0"}


def checkpoint(path: Path, seed: int = 0, **card: Any) -> Path:
    save_tensors(path, small_network(seed).state_dict(), {**CARD, **card})
    return path


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_presets_are_one_aligned_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert sims("presets") == 0
    header, *rows, note = capsys.readouterr().out.strip().split("\n")
    assert len(rows) == 16
    for column, example in (("params", "55.7M"), ("NFE", "35"), ("FID", "1.97"), ("SIMS FID", "1.41")):
        assert rows[0][header.index(column) :].startswith(example)
    assert "sims run NAME" in note


@pytest.mark.parametrize(("w", "seed"), [(0, 0), (-1, 1)])
def test_merging_with_w_0_or_minus_1_gives_base_or_auxiliary_bit_for_bit(w: float, seed: int, tmp_path: Path) -> None:
    base, aux = checkpoint(tmp_path / "a.safetensors"), checkpoint(tmp_path / "b.safetensors", 1, role="auxiliary")
    assert sims("merge", base, aux, tmp_path / "out.safetensors", "--w", str(w)) == 0
    merged, card = load_tensors(tmp_path / "out.safetensors")
    expected = small_network(seed).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert (
        card["role"] == "neon" and card["w"] == w and card["licence"] == CARD["licence"] and len(card["parents"]) == 2
    )


def test_a_merged_network_is_an_ordinary_checkpoint_that_costs_as_much_as_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, aux = checkpoint(tmp_path / "a.safetensors"), checkpoint(tmp_path / "b.safetensors", 1)
    neon = tmp_path / "neon.safetensors"
    assert sims("merge", base, aux, neon, "--w", "0.5") == 0
    costs = {}
    for name, words in (
        ("base", ["--base", base]),
        ("neon", ["--base", neon]),
        ("sims", ["--base", base, "--aux", aux, "--omega", "1"]),
        ("interval", ["--base", base, "--aux", aux, "--omega", "1", "--sigma-lo", "1", "--sigma-hi", "10"]),
        ("euler", ["--base", base, "--solver", "euler"]),
        ("preset", ["--base", base, "--preset", "edm-imagenet64-adm"]),
    ):
        assert sims("sample", tmp_path / f"{name}.png", *words, "--n", "4", "--steps", "4") == 0
        costs[name] = capsys.readouterr().out.rpartition("images, ")[2].split()[0]
    assert costs == {"base": "7", "neon": "7", "sims": "14", "interval": "9", "euler": "4", "preset": "7"}
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in costs}) == len(costs)


def test_show_prints_the_card_and_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sims("checkpoint", "show", checkpoint(tmp_path / "a.safetensors")) == 0
    said = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in small_network().parameters())
    for words in ("role: base", "nimg: 1000", f"parameters: {count}", "- float32", "licence: CC BY-NC-SA 4.0"):
        assert words in said


def test_verify_accepts_a_whole_checkpoint_and_names_what_is_wrong_with_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sims("checkpoint", "verify", checkpoint(tmp_path / "a.safetensors")) == 0
    assert "all finite, SHA-256" in capsys.readouterr().out
    poisoned = small_network().state_dict()
    poisoned["model.map_layer0.weight"][0, 0] = torch.nan
    missing = {k: v for k, v in small_network().state_dict().items() if k != "model.map_layer0.weight"}
    for tensors, sentence in (
        (poisoned, "model.map_layer0.weight has values that are not finite"),
        (missing, "Missing"),
    ):
        save_tensors(tmp_path / "b.safetensors", tensors, CARD)
        assert sims("checkpoint", "verify", tmp_path / "b.safetensors") == 1
        assert sentence in refused(capsys)


def test_verify_compares_with_the_manifest_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = Store(tmp_path).artifact("train", {})
    path = checkpoint(artifact.path / "a.safetensors")
    artifact.commit({path.name: {}})
    assert (artifact.path / MANIFEST).is_file()
    assert sims("checkpoint", "verify", path) == 0
    assert "as in its manifest" in capsys.readouterr().out
    checkpoint(path, seed=1)
    assert sims("checkpoint", "verify", path) == 1
    assert "its manifest says" in refused(capsys)


def test_convert_changes_the_dtype_of_weights_and_not_of_buffers(tmp_path: Path) -> None:
    source, half = checkpoint(tmp_path / "a.safetensors"), tmp_path / "half.safetensors"
    assert sims("checkpoint", "convert", source, half, "--dtype", "float16") == 0
    tensors, card = load_tensors(half)
    weights = dict(small_network().named_parameters())
    assert card == CARD
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float16} == weights.keys()
    assert all(torch.equal(tensors[name], weight.half()) for name, weight in weights.items())
    assert sims("sample", tmp_path / "grid.png", "--base", half, "--n", "2", "--steps", "2") == 0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_convert_makes_a_checkpoint_of_a_bare_state_dict_and_refuses_one_of_another_network(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / f"weights{suffix}"
    state: dict[str, Tensor] = small_network().state_dict()
    torch.save(state, bare) if suffix == ".pt" else save_file(state, bare)
    assert sims("checkpoint", "convert", bare, tmp_path / "out.safetensors", "--preset", "edm-cifar10-vp") == 1
    assert "it is of another network" in refused(capsys)
    assert not (tmp_path / "out.safetensors").exists()


def test_convert_reads_no_pickle_but_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"net": small_network()}, tmp_path / "whole.pt")
    assert (
        sims("checkpoint", "convert", tmp_path / "whole.pt", tmp_path / "o.safetensors", "--preset", "edm-ffhq64-vp")
        == 1
    )
    assert "is not a plain state dict" in refused(capsys)


def test_reconstruct_makes_an_average_of_any_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for nimg in (1000, 2000):
        for std in (0.05, 0.1):
            save_average(tmp_path, nimg, std, small_network(nimg).state_dict(), CARD)
    files = sorted(tmp_path.glob("average-*"))
    assert sims("checkpoint", "reconstruct", tmp_path / "out.safetensors", *files, "--std", "0.1") == 0
    tensors, card = load_tensors(tmp_path / "out.safetensors")
    stored, _ = load_tensors(average_path(tmp_path, 2000, 0.1))
    assert card["ema"] == {"kind": "power", "std": 0.1} and card["nimg"] == 2000
    for name, tensor in stored.items():
        torch.testing.assert_close(tensors[name], tensor.float(), rtol=1e-4, atol=1e-4)
    assert sims("checkpoint", "reconstruct", tmp_path / "o.safetensors", *files, "--std", "0.5") == 1
    assert "does not exist" in refused(capsys)


def test_a_snapshot_of_nvidias_comes_in_and_can_be_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs = {
        "model_type": "SongUNet", "img_resolution": 8, "img_channels": 3, "label_dim": 0, "use_fp16": False,
        "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9,
    }  # fmt: skip
    content = standin.snapshot(standin.network(kwargs), kwargs, tmp_path / "marker")
    (tmp_path / "theirs.pkl").write_bytes(standin.dumps(content))
    out = tmp_path / "base.safetensors"
    assert sims("import-nvlabs", tmp_path / "theirs.pkl", out) == 0
    assert "CC BY-NC-SA 4.0" in capsys.readouterr().out
    assert not (tmp_path / "marker").exists()
    assert sims("checkpoint", "verify", out) == 0
    assert sims("sample", tmp_path / "grid.png", "--base", out, "--n", "2", "--steps", "2") == 0
    assert sims("import-nvlabs", tmp_path / "theirs.pkl", out) == 1
    assert "nothing is overwritten" in refused(capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["merge", "{a}", "nowhere.safetensors", "o.safetensors"], "no checkpoint at nowhere.safetensors"),
        (["merge", "{a}", "{wide}", "o.safetensors"], "the networks differ"),
        (["merge", "{a}", "{a}", "{wide}"], "exists and is not overwritten"),
        (["merge", "{a}", "{a}", "o.pt"], "does not end in .safetensors"),
        (["checkpoint", "show", "nowhere"], "no checkpoint at nowhere"),
        (["checkpoint", "convert", "{a}", "o.safetensors", "--preset", "nonsense"], "no preset 'nonsense'"),
        (["sample", "o.png", "--base", "{a}", "--aux", "{wide}", "--omega", "1"], "hold different networks"),
        (["sample", "o.png", "--base", "{a}", "--omega", "1"], "--aux and --omega go together"),
        (["sample", "o.png", "--base", "{a}", "--aux", "{a}"], "--aux and --omega go together"),
        (["sample", "o.png", "--base", "{a}", "--preset", "nonsense"], "no preset 'nonsense'"),
        (["sample", "o.png", "--base", "{latent}"], "makes 4 channels, not grey or RGB images"),
        (["merge", "{a}", "{a}", "o.safetensors", "--w", "nan"], "is not a strength"),
        (["checkpoint", "show", "{odd}"], "describes a network that cannot be built"),
        (["checkpoint", "convert", "{odd}", "o.safetensors"], "describes a network that cannot be built"),
        (["sample", "o.png", "--run", "r", "--sigma-hi", "1"], "go with --base"),
        (["import-nvlabs", "nowhere.pkl", "o.safetensors"], "no snapshot at nowhere.pkl"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wide = {**SETTINGS, "model_channels": 16}
    checkpoint(tmp_path / "a.safetensors")
    save_tensors(
        tmp_path / "wide.safetensors", small_network(model_channels=16).state_dict(), {**CARD, "network": wide}
    )
    latent = {**CARD, "network": {**SETTINGS, "img_channels": 4}}
    save_tensors(tmp_path / "latent.safetensors", small_network(img_channels=4).state_dict(), latent)
    odd = {**CARD, "network": {**SETTINGS, "nonsense": 1}}
    save_tensors(tmp_path / "odd.safetensors", small_network().state_dict(), odd)
    before = sorted(tmp_path.iterdir())
    names = {name: f"{name}.safetensors" for name in ("a", "wide", "latent", "odd")}
    assert sims(*(word.format(**names) for word in words)) == 1
    assert sentence in refused(capsys)
    assert sorted(tmp_path.iterdir()) == before
