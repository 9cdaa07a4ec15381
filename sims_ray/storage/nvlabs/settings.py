"""Network settings of this package from the constructor arguments in a snapshot of EDM or EDM2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sims_ray.storage.nvlabs.objects import Record
from sims_ray.storage.nvlabs.reader import Refusal, shown

POSITIONAL = ("img_resolution", "img_channels", "label_dim")  # how the constructors of EDM and EDM2 begin
SAMPLER_BOUNDS = ("sigma_min", "sigma_max")  # noise levels that EDM's own sampler is held to; not the network's
OTHER_PRECONDS = ("VPPrecond", "VEPrecond", "iDDPMPrecond")
ADVICE = "give a snapshot of EDM (EDMPrecond) or EDM2 (Precond)"
MAX_WIDTH, MAX_COUNT, MAX_LEVELS = 1 << 16, 64, 16  # far above every published network; a hostile one cannot stall

_Check = Callable[[Any], bool]


class _Option(NamedTuple):
    check: _Check
    default: Any = None
    required: bool = False


def _whole(low: int, high: int) -> _Check:
    return lambda value: type(value) is int and low <= value <= high


def _wholes(low: int, high: int) -> _Check:
    each = _whole(low, high)
    return lambda value: type(value) is list and len(value) <= MAX_LEVELS and all(map(each, value))


def _real(low: float, high: float) -> _Check:
    return lambda value: type(value) in (int, float) and low <= value <= high  # false for nan


def _one_of(*names: str) -> _Check:
    return lambda value: type(value) is str and value in names


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


_SIZE, _MULT, _SHARE = _whole(1, MAX_WIDTH), _whole(1, MAX_COUNT), _real(0, 1)
_COMMON = {
    "img_resolution": _Option(_SIZE, required=True),
    "img_channels": _Option(_SIZE, required=True),
    "label_dim": _Option(_whole(0, 1 << 20), 0),
    "sigma_data": _Option(_real(1e-6, 1e6), 0.5),
}


def _unet(channels: int, mult: list[int], num_blocks: int, attention: list[int], dropout: float) -> dict[str, _Option]:
    return {
        "model_channels": _Option(_SIZE, channels),
        "channel_mult": _Option(_wholes(1, MAX_COUNT), mult),
        "num_blocks": _Option(_MULT, num_blocks),
        "attn_resolutions": _Option(_wholes(0, MAX_WIDTH), attention),
        "dropout": _Option(_SHARE, dropout),
    }


_EDM = {
    **_COMMON,
    "augment_dim": _Option(lambda value: type(value) is int and value in (0, 9), 0),  # 9: EDM's label
    "channel_mult_emb": _Option(_MULT, 4),
    "label_dropout": _Option(_SHARE, 0.0),
}
_SONG = {
    **_EDM,
    **_unet(128, [1, 2, 2, 2], 4, [16], 0.10),
    "embedding_type": _Option(_one_of("positional", "fourier"), "positional"),
    "channel_mult_noise": _Option(_MULT, 1),
    "encoder_type": _Option(_one_of("standard", "skip", "residual"), "standard"),
    "decoder_type": _Option(_one_of("standard", "skip"), "standard"),
    "resample_filter": _Option(_wholes(1, MAX_WIDTH), [1, 1]),
}
_ADM = {**_EDM, **_unet(192, [1, 2, 3, 4], 3, [32, 16, 8], 0.10)}
_EDM2 = {
    **_COMMON,
    **_unet(192, [1, 2, 3, 4], 3, [16, 8], 0.0),
    "channel_mult_noise": _Option(_or_none(_MULT)),
    "channel_mult_emb": _Option(_or_none(_MULT)),
    "label_balance": _Option(_SHARE, 0.5),
    "concat_balance": _Option(_SHARE, 0.5),
    "channels_per_head": _Option(_SIZE, 64),
    "res_balance": _Option(_SHARE, 0.3),
    "attn_balance": _Option(_SHARE, 0.3),
    "clip_act": _Option(_or_none(_real(0, 1e9)), 256),
    "logvar_channels": _Option(_SIZE, 128),
}


class _Family(NamedTuple):
    architecture: str
    modules: Mapping[str, str]  # the class that each module of the denoiser must have
    options: Mapping[str, _Option]


_EDM2_FAMILY = _Family("edm2_unet", {"unet": "UNet", "logvar_fourier": "MPFourier", "logvar_linear": "MPConv"}, _EDM2)
_EDM_FAMILIES = {
    "SongUNet": _Family("song_unet", {"model": "SongUNet"}, _SONG),
    "DhariwalUNet": _Family("adm_unet", {"model": "DhariwalUNet"}, _ADM),
}


def network_settings(network: Record) -> tuple[dict[str, Any], str]:
    """The settings that `build_network` takes, with every default spelled out, and the network's precision.

    Raises:
        Refusal: another class, or an argument that is unknown or not possible.
    """
    if network.kind not in ("EDMPrecond", "Precond"):
        other = " of another method" if network.kind in OTHER_PRECONDS else ""
        raise Refusal(f"holds a network{other} of class {shown(network.kind)}, which is not supported; {ADVICE}")
    arguments = _arguments(network)
    fp16 = arguments.pop("use_fp16", False)
    if type(fp16) is not bool:
        raise Refusal(f"sets use_fp16 of {network.kind} to {shown(fp16)}; {ADVICE}")
    family = _EDM2_FAMILY if network.kind == "Precond" else _edm_family(arguments)
    _check_modules(network, family)
    return {"architecture": family.architecture, **_options(network, family, arguments)}, (
        "float16" if fp16 else "float32"
    )


def _arguments(network: Record) -> dict[str, Any]:
    """Positional and named arguments of the constructor, under their names."""
    positional, named = network.state.get("_init_args"), network.state.get("_init_kwargs")
    if not isinstance(positional, tuple | list) or not isinstance(named, dict):
        raise Refusal(f"does not tell the constructor arguments of its network; {ADVICE}")
    first = dict(zip(POSITIONAL, positional, strict=False))
    if len(positional) > len(POSITIONAL) or first.keys() & named.keys():
        raise Refusal(
            f"has {len(positional)} positional constructor arguments, some of them unknown or twice; {ADVICE}"
        )
    return {**first, **named}


def _edm_family(arguments: dict[str, Any]) -> _Family:
    for name in SAMPLER_BOUNDS:
        arguments.pop(name, None)
    kind = arguments.pop("model_type", "DhariwalUNet")
    if type(kind) is not str or kind not in _EDM_FAMILIES:
        raise Refusal(f"holds a network of the model type {shown(kind)}, not {' or '.join(_EDM_FAMILIES)}; {ADVICE}")
    return _EDM_FAMILIES[kind]


def _check_modules(network: Record, family: _Family) -> None:
    modules = network.state.get("_modules")
    for name, kind in family.modules.items():
        module = modules.get(name) if type(modules) is dict else None
        if not isinstance(module, Record) or module.kind != kind:
            found = shown(module.kind) if isinstance(module, Record) else "nothing"
            raise Refusal(f"has {found} instead of a {kind} as the module {name} of its network; {ADVICE}")


def _options(network: Record, family: _Family, arguments: Mapping[str, Any]) -> dict[str, Any]:
    for name in arguments:
        if name not in family.options:
            raise Refusal(f"sets the option {shown(name)} of {network.kind}, which sims_ray does not have; {ADVICE}")
    settings = {}
    for name, option in family.options.items():
        if option.required and name not in arguments:
            raise Refusal(f"does not tell {name}, an argument that {network.kind} needs; {ADVICE}")
        value = arguments.get(name, option.default)
        value = list(value) if type(value) in (tuple, list) else value
        if not option.check(value):
            raise Refusal(f"sets {name} of {network.kind} to {_value(value)}, which is not possible; {ADVICE}")
        settings[name] = value
    return settings


def _value(value: Any) -> str:
    return shown(repr(value)) if type(value) in (int, float, bool, str) else shown(value)
