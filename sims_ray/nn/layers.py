"""Layers of the EDM networks (arXiv 2206.00364, App. F): convolutions that resample, norms, embeddings, blocks.

Parameter names are those of the public EDM checkpoints. Weights are kept in float32 and cast to the dtype of
what they are applied to, so that a network runs in the precision of its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sims_ray.nn.dropout import ImageDropout

CHANNELS_PER_GROUP = 4
MAX_GROUPS = 32


class Encoded(NamedTuple):
    """A U-Net between two layers of its decoder; at first between encoder and decoder.

    Attributes:
        x: features.
        skips: features of those encoder layers that the decoder still needs, first layer first.
        emb: embedding of noise level and labels [B, emb_channels].
        layer: how many decoder layers are done.
        image: the output so far, where the decoder builds it up over several layers.
    """

    x: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor
    layer: int = 0
    image: Tensor | None = None


@dataclass(frozen=True)
class Init:
    """How fresh weights are drawn.

    Attributes:
        mode: 'xavier_uniform', 'kaiming_uniform' or 'kaiming_normal'.
        weight: factor of the weights.
        bias: factor of the biases.
    """

    mode: str = "xavier_uniform"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: Sequence[int], fan_in: int, fan_out: int, factor: float) -> nn.Parameter:
        """Fresh values of one parameter."""
        if self.mode == "kaiming_normal":
            return nn.Parameter(torch.randn(*shape) * math.sqrt(1 / fan_in) * factor)
        bound = math.sqrt(3 / fan_in) if self.mode == "kaiming_uniform" else math.sqrt(6 / (fan_in + fan_out))
        return nn.Parameter((torch.rand(*shape) * 2 - 1) * bound * factor)


ZERO = Init(weight=0.0)


class Linear(nn.Module):
    """Affine map of the last axis."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init: Init | None = None) -> None:
        super().__init__()
        init = init or Init()
        fans = in_features, out_features
        self.weight = init.draw([out_features, in_features], *fans, init.weight)
        self.bias = init.draw([out_features], *fans, init.bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_features] to [B, out_features]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Same-size convolution, optionally with 2x down- or up-sampling by a separable filter before it.

    Args:
        in_channels, out_channels: widths.
        kernel: size of the convolution; 0 leaves it out and only resamples.
        up, down: resample by two.
        filter_taps: the filter along one axis.
        fused: where the order is free, filter after the convolution when going down, and leave the padding to
            one of the two: the result differs at the border.
        init: how fresh weights are drawn.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        filter_taps: Sequence[int] = (1, 1),
        fused: bool = False,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused = up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            init = init or Init()
            fans = in_channels * kernel**2, out_channels * kernel**2
            self.weight = init.draw([out_channels, in_channels, kernel, kernel], *fans, init.weight)
            self.bias = init.draw([out_channels], *fans, init.bias)
        if up or down:
            taps = torch.as_tensor(filter_taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])

    def _resample(self, x: Tensor, padding: int) -> Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.up:  # zero insertion divides the mean by 4
            return F.conv_transpose2d(x, taps * 4, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H', W'] with H' = H, 2H or H/2."""
        f_pad = (self.resample_filter.shape[-1] - 1) // 2 if self.up or self.down else 0
        if self.weight is None or self.bias is None:
            return self._resample(x, f_pad)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        pad = weight.shape[-1] // 2
        if self.fused and self.down:  # the filter sums to one, so the bias may come before it
            return self._resample(F.conv2d(x, weight, bias, padding=pad + f_pad), 0)
        if self.fused and self.up:
            return F.conv2d(self._resample(x, max(f_pad - pad, 0)), weight, bias, padding=max(pad - f_pad, 0))
        if self.up or self.down:
            x = self._resample(x, f_pad)
        return F.conv2d(x, weight, bias, padding=pad)


class GroupNorm(nn.Module):
    """Group normalisation over min(32, channels / 4) groups, or fewer where those do not divide the channels."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        most = min(MAX_GROUPS, channels // CHANNELS_PER_GROUP)
        self.groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        if self.weight.requires_grad and not x.requires_grad and torch.is_grad_enabled() and x.device.type == "cpu":
            # Behind a frozen encoder. torch 2.13 ends the process in the backward pass of such a norm on a CPU.
            x = x.detach().requires_grad_()
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def num_heads(channels: int, channels_per_head: int | None) -> int:
    """Attention heads of a layer; none where it is narrower than a head, as in the published networks.

    Raises:
        ValueError: the channels do not divide into heads.
    """
    if channels_per_head is None:
        return 1
    heads = channels // channels_per_head
    if heads and channels % heads:
        raise ValueError(f"{channels} channels do not divide into {heads} attention heads; change channels_per_head")
    return heads


@dataclass(frozen=True)
class BlockStyle:
    """What the residual blocks of one network have in common.

    Attributes:
        dropout: probability.
        eps: of the norms.
        skip_scale: factor of a residual sum; sqrt(1/2) keeps the variance at that of its terms.
        adaptive_scale: condition by scale and shift instead of shift alone.
        channels_per_head: attention width; None for a single head.
        resample_proj: a skip that resamples also has a 1x1 convolution.
        filter_taps: resampling filter.
        init, init_zero, init_attn: fresh weights; of the last convolution; of the attention's projections.
    """

    dropout: float
    eps: float
    skip_scale: float
    adaptive_scale: bool
    channels_per_head: int | None
    resample_proj: bool
    filter_taps: tuple[int, ...]
    init: Init
    init_zero: Init
    init_attn: Init


class UNetBlock(nn.Module):
    """Residual block, conditioned on the embedding, with optional self-attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        style: BlockStyle,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.style = in_channels, out_channels, style
        resample = {"up": up, "down": down, "filter_taps": style.filter_taps}
        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample, init=style.init)  # type: ignore[arg-type]
        self.affine = Linear(emb_channels, out_channels * (2 if style.adaptive_scale else 1), init=style.init)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.dropout = ImageDropout(style.dropout)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=style.init_zero)
        self.skip: Conv2d | None = None
        if in_channels != out_channels or up or down:
            kernel = 1 if style.resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resample, init=style.init)  # type: ignore[arg-type]
        self.num_heads = num_heads(out_channels, style.channels_per_head) if attention else 0
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, init=style.init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, init=style.init_zero)

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # The checkpoints lay the channels out as [heads, C / heads, 3]: q, k and v are interleaved.
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2)  # each [B, heads, HW, C / heads]
        a = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(a.transpose(2, 3).reshape(x.shape))
        return out

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x [B, in_channels, H, W] and emb [B, emb_channels] to [B, out_channels, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        affine = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.style.adaptive_scale:
            scale, shift = affine.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + affine))
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        if self.num_heads:
            x = (self._attend(x) + x) * self.style.skip_scale
        return x
