import json
import os
import pickle
import pickletools
import random
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import sha256_file
from sims_ray.storage.checkpoints import load_model, load_tensors
from sims_ray.storage.nvlabs import import_nvlabs
from tests.storage.standin import (
    Call,
    EasyDict,
    as_global,
    dumps,
    marker_source,
    module_tree,
    modules,
    network,
    persistent,
    snapshot,
    storage_bytes,
)

GOLDEN = Path(__file__).parent.parent / "golden"
NETWORKS = ["ddpmpp_cond_r16", "ncsnpp_uncond_r16", "adm_cond_r16", "edm2_cond_r16", "edm2_uncond_r16"]
TINY = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_type": "SongUNet", "model_channels": 8,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip
TINY_EDM2 = {k: v for k, v in TINY.items() if k != "model_type"} | {"logvar_channels": 8, "channels_per_head": 8}


@cache
def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and state dict of one of the authors' own networks."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        kwargs = json.loads(file.metadata()["config"])["network"]
        names = [key for key in file.keys() if key.startswith("base.")]  # noqa: SIM118
        return kwargs, {key.removeprefix("base."): file.get_tensor(key) for key in names}


def tiny(**kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A small network and its constructor arguments, which `kwargs` override in name only."""
    torch.manual_seed(0)
    return network(TINY), {**TINY, **kwargs}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def convert(tmp_path: Path, marker: Path) -> Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]:
    """Import a file with this content; returns the tensors and the card of the checkpoint."""

    def run(content: bytes, name: str = "snapshot.pkl") -> tuple[dict[str, Tensor], dict[str, Any]]:
        source, target = tmp_path / name, tmp_path / "out" / "net.safetensors"
        source.write_bytes(content)
        card = import_nvlabs(source, target)
        tensors, stored = load_tensors(target)
        assert stored == card
        assert not marker.exists()
        return tensors, card

    return run


@pytest.fixture
def refused(tmp_path: Path, marker: Path) -> Callable[[bytes], str]:
    """Import a file with this content, which must be refused in one sentence and without a trace."""

    def run(content: bytes) -> str:
        source, target = tmp_path / "snapshot.pkl", tmp_path / "out" / "net.safetensors"
        source.write_bytes(content)
        with pytest.raises(SimsError) as error:
            import_nvlabs(source, target)
        message = str(error.value)
        assert message.startswith(f"{source} ")
        assert "\n" not in message
        assert len(message) < 600
        assert {path.name for path in tmp_path.iterdir()} == {"snapshot.pkl"}
        return message

    return run


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert torch.equal(bits(actual[name]), bits(tensor))


# What a snapshot holds comes out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_snapshot_in_nvidias_layout_comes_out_bit_for_bit(
    convert: Callable[..., Any], marker: Path, name: str, dtype: torch.dtype
) -> None:
    kwargs, weights = golden(name)
    kwargs = {**kwargs, "use_fp16": dtype == torch.float16}
    net = network(kwargs)
    net.load_state_dict(weights)
    net.to(dtype)
    tensors, card = convert(dumps(snapshot(net, kwargs, marker)))
    assert_same_bits(tensors, {key: value.to(dtype) for key, value in weights.items()})
    assert card["precision"] == ("float16" if dtype == torch.float16 else "float32")
    assert card["num_parameters"] == sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_an_imported_network_denoises_as_the_one_in_the_snapshot(
    convert: Callable[..., Any], marker: Path, tmp_path: Path, name: str
) -> None:
    kwargs, weights = golden(name)
    net = network(kwargs)
    net.load_state_dict(weights)
    convert(dumps(snapshot(net, kwargs, marker)))
    loaded, _ = load_model(tmp_path / "out" / "net.safetensors")
    size = kwargs["img_resolution"]
    x, sigma = torch.randn(2, kwargs["img_channels"], size, size), torch.tensor([0.1, 3.0])
    labels = torch.eye(kwargs["label_dim"])[:2] if kwargs["label_dim"] else None
    with torch.no_grad():
        assert torch.equal(loaded(x, sigma, labels), net.eval()(x, sigma, labels))


def test_the_source_that_comes_with_a_snapshot_would_run_elsewhere_but_not_here(
    convert: Callable[..., Any], marker: Path
) -> None:
    content = dumps(snapshot(*tiny(), marker))
    with modules():
        pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    convert(content)  # checks that there is no marker


def test_the_card_tells_source_licence_and_every_setting(
    convert: Callable[..., Any], marker: Path, tmp_path: Path
) -> None:
    _, card = convert(dumps(snapshot(*tiny(dropout=0.13, sigma_min=0, sigma_max=float("inf")), marker)))
    assert card["role"] == "base"
    assert card["licence"] == "CC BY-NC-SA 4.0 (NVIDIA; non-commercial)"
    assert card["parents"] == []
    digest = sha256_file(tmp_path / "snapshot.pkl")
    assert card["source"] == {"file": "snapshot.pkl", "sha256": digest, "class": "EDMPrecond"}
    assert card["network"] == {
        "architecture": "song_unet", "img_resolution": 8, "img_channels": 1, "label_dim": 0, "sigma_data": 0.5,
        "augment_dim": 0, "model_channels": 8, "channel_mult": [1], "channel_mult_emb": 4, "num_blocks": 1,
        "attn_resolutions": [], "dropout": 0.13, "label_dropout": 0.0, "embedding_type": "positional",
        "channel_mult_noise": 1, "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "nimg", "ema"),
    [
        ("edm2-img64-s-1073741-0.075.pkl", 1_073_741_000, {"kind": "power", "std": 0.075}),
        ("edm2-img512-xs-uncond-2147483-0.110.pkl", 2_147_483_000, {"kind": "power", "std": 0.11}),
        ("network-snapshot-200000.pkl", 200_000_000, None),
        ("edm-cifar10-32x32-cond-vp.pkl", None, None),
    ],
)
def test_training_length_and_ema_come_from_the_file_name(
    convert: Callable[..., Any], marker: Path, name: str, nimg: int | None, ema: dict[str, Any] | None
) -> None:
    _, card = convert(dumps(snapshot(network(TINY_EDM2), TINY_EDM2, marker)), name)
    assert (card["nimg"], card.get("ema")) == (nimg, ema)


def test_the_encoder_of_edm2_stands_in_the_card(convert: Callable[..., Any], marker: Path) -> None:
    _, card = convert(dumps(snapshot(network(TINY_EDM2), TINY_EDM2, marker)))
    assert (card["encoder"], card["source"]["class"]) == ("StabilityVAEEncoder", "Precond")


LATENT_NET = {**TINY_EDM2, "img_channels": 4}
EDM2_MEAN, EDM2_STD = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]


def with_encoder(marker: Path, kind: str = "StabilityVAEEncoder", **state: Any) -> dict[str, Any]:
    """A snapshot of a network of latents whose encoder has this state."""
    return {**snapshot(network(LATENT_NET), LATENT_NET, marker), "encoder": persistent(kind, state)}


def computed(mean: list[float], std: list[float], final_mean: float = 0.0) -> dict[str, Any]:
    """What EDM2's encoder computes with, for these statistics."""
    scale = np.float32(0.5) / np.float32(std)
    return {"scale": scale, "bias": np.float32(final_mean) - np.float32(mean) * scale}


def test_how_latents_relate_to_pixels_stands_in_the_card(convert: Callable[..., Any], marker: Path) -> None:
    state = {"vae_name": "stabilityai/sd-vae-ft-mse", "batch_size": 8, "_vae": None, "_init_args": ()}
    _, card = convert(dumps(with_encoder(marker, **state, _init_kwargs=EasyDict(), **computed(EDM2_MEAN, EDM2_STD))))
    assert card["latents"] == {
        "vae": "stabilityai/sd-vae-ft-mse", "raw_mean": EDM2_MEAN, "raw_std": EDM2_STD,
        "final_mean": 0.0, "final_std": 0.5, "pixel_range": [0, 1], "rounding": "down",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["named", "positional"])
def test_what_the_encoder_was_made_with_goes_before_the_defaults(
    convert: Callable[..., Any], marker: Path, form: str
) -> None:
    given = {"vae_name": "me/vae", "raw_mean": (1, 2, 3, 4), "raw_std": [1.5, 2.0, 3.0, 4.0], "final_mean": 0.25}
    made = {"_init_kwargs": given} if form == "named" else {"_init_args": tuple(given.values())}
    _, card = convert(dumps(with_encoder(marker, **made)))
    found = {key: card["latents"][key] for key in ("vae", "raw_mean", "raw_std", "final_mean", "final_std")}
    assert found == {
        "vae": "me/vae", "raw_mean": [1, 2, 3, 4], "raw_std": [1.5, 2.0, 3.0, 4.0], "final_mean": 0.25,
        "final_std": 0.5,
    }  # fmt: skip


def test_what_the_encoder_computes_with_goes_before_all(convert: Callable[..., Any], marker: Path) -> None:
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 4.0, 1.0, 0.5]
    made = {"vae_name": "me/vae", "_init_kwargs": {"vae_name": "old/vae", "raw_std": EDM2_STD, "final_mean": 0.25}}
    _, card = convert(dumps(with_encoder(marker, **made, **computed(mean, std, 0.25))))
    entry = card["latents"]
    assert entry["vae"] == "me/vae"
    assert entry["raw_mean"] == pytest.approx(mean) and entry["raw_std"] == pytest.approx(std)


def test_a_network_of_images_has_no_latents(convert: Callable[..., Any], marker: Path) -> None:
    for content in (
        with_encoder(marker, "StandardRGBEncoder"),
        snapshot(network(TINY_EDM2), TINY_EDM2, marker),  # one channel, and the encoder of latents
        snapshot(*tiny(), marker),
    ):
        _, card = convert(dumps(content))
        assert "latents" not in card
        shutil.rmtree(marker.parent / "out")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"_init_kwargs": {"raw_std": [1, 2, 3, 0]}}, "latents.raw_std.3 is not possible"),
        ({"_init_kwargs": {"raw_mean": "abcd"}}, "latents.raw_mean is not possible"),
        ({"_init_kwargs": {"final_std": float("nan")}}, "latents.final_std"),
        ({"_init_kwargs": {"raw_mean": [1, 2]}}, "latents.raw_mean has 2 values, raw_std 4"),
        ({"vae_name": 7}, "latents.vae"),
        ({"vae_name": "x" * 5000}, "latents.vae"),
        ({"_init_kwargs": [1]}, "does not tell the constructor arguments of its encoder"),
        ({"scale": np.zeros(4, np.float32), "bias": np.zeros(4, np.float32)}, "latents.raw_std.0"),
        ({"scale": np.full(4, np.nan), "bias": np.zeros(4)}, "latents.raw_mean.0"),
    ],
)
def test_an_encoder_that_is_not_possible_is_refused(
    refused: Callable[[bytes], str], marker: Path, state: dict[str, Any], reason: str
) -> None:
    assert reason in refused(dumps(with_encoder(marker, **state)))


def test_numpy_values_are_read_under_their_old_module_names_too(convert: Callable[..., Any], marker: Path) -> None:
    scalar = as_global(lambda *_: None, "numpy.core.multiarray", "scalar")
    array = as_global(lambda *_: None, "numpy.core.multiarray", "_reconstruct")
    old = Call(scalar, np.dtype("f8"), np.float64(0.25).tobytes())
    for content in (
        {**snapshot(*tiny(dropout=old), marker), "dataset_kwargs": Call(array, np.ndarray, (0,), b"b")},
        snapshot(*tiny(dropout=np.float64(0.25)), marker),
    ):
        _, card = convert(dumps(content, scalar, array))
        assert card["network"]["dropout"] == 0.25
        shutil.rmtree(marker.parent / "out")


@pytest.mark.parametrize("protocol", [4, 5])
def test_newer_protocols_are_read_alike(convert: Callable[..., Any], marker: Path, protocol: int) -> None:
    net, kwargs = tiny()
    tensors, _ = convert(dumps(snapshot(net, kwargs, marker), protocol=protocol))
    assert_same_bits(tensors, net.state_dict())


def test_leading_positional_arguments_count_as_named_ones(convert: Callable[..., Any], marker: Path) -> None:
    net, kwargs = tiny()
    content = snapshot(net, {k: v for k, v in kwargs.items() if not k.startswith("img_")}, marker)
    content["ema"].arguments[0]["state"]["_init_args"] = (8, 1)
    _, card = convert(dumps(content))
    assert (card["network"]["img_resolution"], card["network"]["img_channels"]) == (8, 1)


def test_tensors_that_share_a_storage_are_kept_apart(convert: Callable[..., Any], marker: Path) -> None:
    net, kwargs = tiny()
    net.model.map_layer1.bias = net.model.map_layer0.bias  # type: ignore[union-attr]
    tensors, _ = convert(dumps(snapshot(net, kwargs, marker)))
    assert_same_bits(tensors, net.state_dict())


def test_buffers_that_are_not_persistent_are_left_out(convert: Callable[..., Any], marker: Path) -> None:
    net, kwargs = tiny()
    net.model.register_buffer("scratch", torch.zeros(3), persistent=False)  # type: ignore[union-attr]
    tensors, _ = convert(dumps(snapshot(net, kwargs, marker)))
    assert_same_bits(tensors, net.state_dict())


def spliced(value: Any, stream: bytes) -> bytes:
    """The pickle of a value with other instructions in place of the text "here"."""
    content = dumps(value)
    assert content.count(b"\x8c\x04here") == 1
    return content.replace(b"\x8c\x04here", stream)


def test_deep_nesting_beside_the_network_does_no_harm(convert: Callable[..., Any], marker: Path) -> None:
    depth = 200_000
    convert(spliced(laced(marker, dataset_kwargs="here"), b"]" * depth + b"a" * (depth - 1)))


# What is hostile or broken stays out


def laced(marker: Path, **entries: Any) -> dict[str, Any]:
    """A good snapshot with other entries; the source that comes with its objects has a marker of its own."""
    return {**snapshot(*tiny(), marker.with_name("source")), **entries}


def touching(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def os_system_global(marker: Path) -> bytes:
    system = as_global(lambda *_: None, "o_", "system")
    content = dumps(laced(marker, loss_fn=Call(system, f"touch {marker}")), system)
    return content.replace(b"\x8c\x02o_", b"\x8c\x02os")


def eval_in_a_nested_reduce(marker: Path) -> bytes:
    inner = persistent("Inner", {"list": [{"deep": Call(eval, touching(marker))}]}, "")
    return dumps(laced(marker, loss_fn=persistent("EDMLoss", {"inner": inner}, "")))


def bomb_behind_load_from_bytes(marker: Path) -> bytes:
    file = BytesIO()
    torch.save(Call(eval, touching(marker)), file, _use_new_zipfile_serialization=False)
    return dumps(laced(marker, loss_fn=Call(torch.storage._load_from_bytes, file.getvalue())))


def unknown_global(marker: Path) -> bytes:
    return dumps(laced(marker, dataset_kwargs=Counter("abc")))


def truncated(marker: Path) -> bytes:
    content = dumps(snapshot(*tiny(), marker))
    return content[: len(content) * 2 // 3]


def wrong_version(marker: Path) -> bytes:
    net, kwargs = tiny()
    return dumps({"ema": module_tree(net, marker_source(marker), kwargs, version=5)})


def missing_ema(marker: Path) -> bytes:
    content = snapshot(*tiny(), marker)
    del content["ema"]
    return dumps(content)


def not_a_pickle(marker: Path) -> bytes:
    return b"<!DOCTYPE html><title>403 Forbidden</title>"


def zip_file(marker: Path) -> bytes:
    file = BytesIO()
    torch.save({"ema": torch.zeros(3)}, file)
    assert zipfile.is_zipfile(file)
    return file.getvalue()


def ema_less_dict(marker: Path) -> bytes:
    return dumps(laced(marker, ema=None, net=module_tree(tiny()[0], "")))


def huge_declared_storage(marker: Path) -> bytes:
    content = storage_bytes(torch.zeros(3))
    assert content.count(b"K\x03Nt") == 1
    huge = content.replace(b"K\x03Nt", b"\x8a\x06\x00\x00\x00\x00\x00\x40Nt")  # 2**46 values, 256 TiB
    return dumps(laced(marker, loss_fn=Call(torch.storage._load_from_bytes, huge)))


def recursion(marker: Path) -> bytes:
    content = snapshot(*tiny(), marker)
    enc = content["ema"].arguments[0]["state"]["_modules"]["model"].arguments[0]["state"]["_modules"]["enc"]
    enc.__dict__["_modules"]["again"] = enc
    return dumps(content)


HOSTILE: dict[Callable[[Path], bytes], str] = {
    os_system_global: "names the global os.system, which no EDM or EDM2 snapshot contains; it may be hostile",
    eval_in_a_nested_reduce: "names the global builtins.eval",
    bomb_behind_load_from_bytes: "names the global __builtin__.eval",
    unknown_global: "names the global collections.Counter",
    truncated: "it is cut off or damaged; download it again",
    wrong_version: "version 5 of torch_utils.persistence, but only version 6",
    missing_ema: "has no entry `ema`",
    not_a_pickle: "is not a pickle",
    zip_file: "is a zip archive",
    ema_less_dict: "holds a NoneType instead of a network in its entry `ema`",
    huge_declared_storage: "declares a storage of 70368744177664 values but holds 3",
    recursion: "has a module inside itself, twice or too deep, at model.enc.again",
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_hostile_or_broken_file_is_refused_in_one_sentence_without_side_effects(
    refused: Callable[[bytes], str], marker: Path, make: Callable[[Path], bytes]
) -> None:
    assert HOSTILE[make] in refused(make(marker))


@pytest.mark.parametrize("make", [os_system_global, eval_in_a_nested_reduce, bomb_behind_load_from_bytes])
def test_the_hostile_files_would_act_where_pickle_reads_them(marker: Path, make: Callable[[Path], bytes]) -> None:
    content = make(marker)
    with modules():
        pickle.loads(content)
    assert marker.exists()


PROTO = b"\x80\x04"
OBJECT = b"\x8c\x0bdnnlib.util\x8c\x08EasyDict\x93"  # pushes the class
ASSEMBLED = {
    "a memo index that would fill gigabytes": b"Nr\xff\xff\xff\xff.",
    "a deep tuple as a key, whose hash crashes": b"})" + b"\x85" * 300_000 + b"Ns.",
    "a deep tuple in a set": b"\x8f()" + b"\x85" * 300_000 + b"\x90.",
    "a state for a class": OBJECT + b"N}\x8c\x01xNs\x86b.",
    "a state for a mapping": OBJECT + b")\x81}b.",
    "a persistent id": b"\x8c\x01xQ.",
    "a text persistent id": b"Pid\n.",
    "an extension code": b"\x82\x01.",
    "the old way to make an instance": b"(cos\nsystem\no.",
    "another old way to make an instance": b"(ios\nsystem\n.",
    "a call of what is no global": b"})R.",
    "a call of a class that is only named": b"\x8c\x05numpy\x8c\x07ndarray\x93)R.",
    "a global whose name is no text": b"NN\x93.",
    "a dotted way to a global": b"\x8c\x0bcollections\x8c\x0fOrderedDict.pop\x93.",
    "a global of text protocols": b"cos\nsystem\n.",
    "a declared string longer than the file": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "declared bytes longer than the file": b"\x8e\xff\xff\xff\xff\x03\x00\x00\x00.",
    "a frame longer than the file": b"\x95\xff\xff\xff\xff\x03\x00\x00\x00N.",
    "a number of any length": b"\x8b\x04\x00\x00\x00\x01\x01\x01\x01.",
    "a stack that is empty": b"R.",
    "no end": b"N",
    "two values": b"NN.",
    "no values": b".",
    "a mark too few": b"t.",
    "no memo of that index": b"h\x07.",
    "a new protocol": b"\x80\x09N.",
    "another byte order": b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f8\x85R(K\x03\x8c\x01>tb.",
    "bytes that do not stand for a global's name": b"\x8c\x02\xff\xff.",
}


REASONS = {
    "a state for a class": "sets the state of an object of type Global",
    "a state for a mapping": "sets the state of an object of type dict",
    "a persistent id": "has the pickle instruction BINPERSID",
    "a call of a class that is only named": "calls numpy.ndarray",
    "a dotted way to a global": "names the global collections.OrderedDict.pop",
    "a global of text protocols": "names the global os.system",
    "a new protocol": "is a pickle of protocol 9",
}


@pytest.mark.parametrize("name", ASSEMBLED)
def test_a_stream_with_what_no_snapshot_has_is_refused(refused: Callable[[bytes], str], name: str) -> None:
    assert REASONS.get(name, "") in refused(PROTO + ASSEMBLED[name])


def test_an_empty_file_a_folder_and_a_missing_file_are_refused(refused: Callable[[bytes], str], tmp_path: Path) -> None:
    assert "is empty" in refused(b"")
    for source, reason in ((tmp_path, "cannot be read"), (tmp_path / "absent.pkl", "no snapshot at")):
        with pytest.raises(SimsError, match=reason):
            import_nvlabs(source, tmp_path / "net.safetensors")


def tensor_call(**changes: Any) -> Call:
    """A tensor [2, 3] that is asked for with other arguments."""
    storage = Call(torch.storage._load_from_bytes, storage_bytes(torch.zeros(6)))
    arguments = {"storage": storage, "offset": 0, "size": (2, 3), "stride": (3, 1), "grad": False, "hooks": {}}
    return Call(torch._utils._rebuild_tensor_v2, *(arguments | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1}, {"size": (2, 4)}, {"stride": (4, 1)}, {"stride": (0, 0), "size": (1 << 30, 1 << 30)},
        {"offset": -1}, {"stride": (-3, 1)}, {"size": (2,)}, {"size": [2, 3]}, {"size": (2.0, 3)}, {"storage": None},
        {"size": (1,) * 1000, "stride": (0,) * 1000}, {"size": (0, 1 << 70), "stride": (1, 1)}, {"offset": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_beyond_its_storage_is_refused(
    refused: Callable[[bytes], str], marker: Path, changes: dict[str, Any]
) -> None:
    refused(dumps(laced(marker, loss_fn=tensor_call(**changes))))


@pytest.mark.parametrize(
    "content",
    [
        storage_bytes(torch.zeros(3))[:-1],
        storage_bytes(torch.zeros(3)) + b"\0",
        storage_bytes(torch.zeros(3)).replace(b"K\x03Nt", b"J\xff\xff\xff\xffNt")[:-20] + b"\xff" * 4,
        storage_bytes(torch.zeros(3)).replace(b"FloatStorage", b"LargeStorage"),
        storage_bytes(torch.zeros(3)).replace(b"storage", b"stowage"),
        storage_bytes(torch.zeros(3))[20:],
        pickle.dumps(3),
        b"",
        "text",
        None,
    ],
)
def test_a_nested_file_that_is_not_one_whole_storage_is_refused(
    refused: Callable[[bytes], str], marker: Path, content: Any
) -> None:
    storage = Call(torch.storage._load_from_bytes, content)
    refused(dumps(laced(marker, loss_fn=storage)))


def test_one_nested_file_is_not_loaded_again_and_again(refused: Callable[[bytes], str], marker: Path) -> None:
    content = storage_bytes(torch.zeros(100_000))
    storages = [Call(torch.storage._load_from_bytes, content) for _ in range(20)]
    assert "loads more bytes than it has" in refused(dumps(laced(marker, loss_fn=storages)))


def test_many_tensors_of_one_storage_do_not_multiply_it(refused: Callable[[bytes], str], marker: Path) -> None:
    content = snapshot(*tiny(), marker)
    shared = torch.zeros(100_000)
    content["ema"].arguments[0]["state"]["_parameters"] |= {f"p{i}": shared for i in range(20)}
    assert "declares tensors of" in refused(dumps(content))


def test_numpy_objects_other_than_numbers_are_refused(refused: Callable[[bytes], str], marker: Path) -> None:
    for value in (np.array([None]), np.array("text"), np.datetime64("2024-01-01"), np.zeros(2, ">f8")):
        refused(dumps(laced(marker, dataset_kwargs={"value": value})))


# What is no network of ours stays out


@pytest.mark.parametrize("kind", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "SongUNet", "Generator"])
def test_networks_of_other_classes_are_refused_by_name(
    refused: Callable[[bytes], str], marker: Path, kind: str
) -> None:
    content = snapshot(*tiny(), marker)
    content["ema"].arguments[0]["class_name"] = kind
    message = refused(dumps(content))
    assert f"of class {kind}, which is not supported; give a snapshot of EDM (EDMPrecond) or EDM2 (Precond)" in message


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"flash_attention": True}, "sets the option flash_attention of EDMPrecond, which sims_ray does not have"),
        ({"num_blocks": 10**9}, "sets num_blocks of EDMPrecond to 1000000000, which is not possible"),
        ({"num_blocks": True}, "sets num_blocks of EDMPrecond to True"),
        ({"dropout": float("nan")}, "sets dropout of EDMPrecond to nan"),
        ({"sigma_data": 10**400}, "sets sigma_data of EDMPrecond to 1000"),
        ({"channel_mult": [1] * 1000}, "sets channel_mult of EDMPrecond to a list"),
        ({"encoder_type": "wavelet\n"}, "sets encoder_type of EDMPrecond to 'wavelet"),
        ({"model_type": "DiT"}, "of the model type DiT, not SongUNet or DhariwalUNet"),
        ({"use_fp16": "yes"}, "sets use_fp16 of EDMPrecond to yes"),
        ({"model_type": "DhariwalUNet"}, "has SongUNet instead of a DhariwalUNet as the module model"),
        ({"model_channels": 1}, "describes a network that cannot be built"),
        ({"model_channels": 16}, "model.map_layer0.weight is (32, 8) instead of (64, 16) (0 tensors missing, 0 not"),
        ({"label_dim": 3}, "model.map_label.weight is missing (2 tensors missing"),
        ({"embedding_type": "fourier"}, "model.map_noise.freqs is missing (1 tensors missing"),
    ],
    ids=str,
)
def test_a_network_that_is_not_what_its_arguments_say_is_refused(
    refused: Callable[[bytes], str], marker: Path, kwargs: dict[str, Any], reason: str
) -> None:
    net, own = tiny()
    assert reason in refused(dumps(snapshot(net, {**own, **kwargs}, marker)))


@pytest.mark.parametrize(
    ("positional", "dropped", "reason"),
    [
        ((8,), (), "has 1 positional constructor arguments, some of them unknown or twice"),
        ((8, 1, 0, False), ("img_resolution", "img_channels", "label_dim"), "has 4 positional"),
        ((), ("img_channels",), "does not tell img_channels"),
        (None, (), "does not tell the constructor arguments"),
    ],
)
def test_constructor_arguments_that_are_not_clear_are_refused(
    refused: Callable[[bytes], str], marker: Path, positional: Any, dropped: tuple[str, ...], reason: str
) -> None:
    net, kwargs = tiny()
    content = snapshot(net, {k: v for k, v in kwargs.items() if k not in dropped}, marker)
    content["ema"].arguments[0]["state"]["_init_args"] = positional
    assert reason in refused(dumps(content))


def test_tensors_too_many_or_not_finite_or_not_real_are_refused(refused: Callable[[bytes], str], marker: Path) -> None:
    for value, reason in (
        (torch.zeros(3), "extra is not expected (0 tensors missing, 1 not expected, 0 of another shape)"),
        (torch.tensor([1.0, float("nan")]), "values that are not finite in the tensor extra"),
        (torch.arange(3), "no tensor of floating-point numbers at extra"),
        (7, "no tensor of floating-point numbers at extra"),
    ):
        content = snapshot(*tiny(), marker)
        content["ema"].arguments[0]["state"]["_buffers"]["extra"] = value
        assert reason in refused(dumps(content))


def test_what_stands_in_place_of_modules_is_refused(refused: Callable[[bytes], str], marker: Path) -> None:
    for part, value in (("_modules", {"x": 7}), ("_parameters", []), ("_non_persistent_buffers_set", ["x"])):
        content = snapshot(*tiny(), marker)
        model = content["ema"].arguments[0]["state"]["_modules"]["model"]
        model.arguments[0]["state"][part] = value
        assert "; give the .pkl file of a network that NVIDIA published" in refused(dumps(content))


def test_a_long_chain_of_modules_is_refused(refused: Callable[[bytes], str], marker: Path) -> None:
    content = snapshot(*tiny(), marker)
    content["ema"].arguments[0]["state"]["_modules"]["chain"] = "here"
    link = b"\x8c\x1atorch.nn.modules.container\x8c\x0aModuleDict\x93)\x81}\x8c\x08_modules}\x8c\x01m"
    chain = link * 5000 + b"N" + b"ssb" * 5000
    assert "has a module inside itself, twice or too deep, at chain.m.m.m" in refused(spliced(content, chain))


def test_a_module_in_two_places_is_refused(refused: Callable[[bytes], str], marker: Path) -> None:
    content = snapshot(*tiny(), marker)
    modules = content["ema"].arguments[0]["state"]["_modules"]
    modules["again"] = modules["model"]  # each level of such doubling would double the walk
    assert "has a module inside itself, twice or too deep, at again" in refused(dumps(content))


def test_nothing_is_overwritten_and_the_target_is_a_safetensors_file(tmp_path: Path, marker: Path) -> None:
    source, target = tmp_path / "x.pkl", tmp_path / "net.safetensors"
    source.write_bytes(dumps(snapshot(*tiny(), marker)))
    target.write_text("mine")
    with pytest.raises(SimsError, match="exists and nothing is overwritten"):
        import_nvlabs(source, target)
    assert target.read_text() == "mine"
    with pytest.raises(SimsError, match=r"does not end in \.safetensors"):
        import_nvlabs(source, tmp_path / "net.pkl")
    assert sorted(os.listdir(tmp_path)) == ["net.safetensors", "x.pkl"]


# Chance finds no way in either


def test_a_mutated_or_truncated_file_is_read_or_refused_and_never_runs(tmp_path: Path, marker: Path) -> None:
    content = dumps(snapshot(*tiny(), marker))
    instructions = [position or 0 for _, _, position in pickletools.genops(content)]
    draw = random.Random(0)
    refusals = 0
    for i in range(200):
        changed = bytearray(content)
        if i % 4 == 0:
            del changed[draw.randrange(len(changed)) :]
        for _ in range(draw.choice([1, 1, 2, 8]) if i % 4 else 0):
            position = draw.choice(instructions) if i % 2 else draw.randrange(len(changed))
            changed[min(position, len(changed) - 1)] = draw.randrange(256)
        (tmp_path / "x.pkl").write_bytes(changed)
        (tmp_path / "net.safetensors").unlink(missing_ok=True)
        try:
            import_nvlabs(tmp_path / "x.pkl", tmp_path / "net.safetensors")
        except SimsError as error:
            refusals += 1
            assert "\n" not in str(error)
        assert not marker.exists()
    assert refusals > 100


def test_the_stand_ins_are_plain_dicts_or_easydicts_as_nvidias_are(marker: Path) -> None:
    assert type(snapshot(*tiny(), marker)) is dict
    assert type(snapshot(network(TINY_EDM2), TINY_EDM2, marker)) is EasyDict
