"""EDM2's magnitude-preserving U-Net, configuration G (Karras et al. 2024, arXiv 2312.02696).

Every layer keeps the expected magnitude of its input, weights are normalised in every forward pass (eq. 47 and
66) and, while they train, forced back onto the unit sphere in place. Parameter names are those of the public
checkpoints. Written from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sims_ray.nn.dropout import ImageDropout
from sims_ray.nn.layers import Encoded, num_heads
from sims_ray.nn.layout import Layer, unet_layout
from sims_ray.nn.mp_layers import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize


def _resample(x: Tensor, mode: str) -> Tensor:
    """Halve by averaging, or double by repeating: the (1, 1) filter."""
    if mode == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if mode == "up" else x


class Block(nn.Module):
    """Magnitude-preserving residual block (EDM2 fig. 21).

    Args:
        in_channels, out_channels, emb_channels: widths.
        flavor: 'enc' or 'dec'.
        resample: 'up' or 'down'; anything else keeps the resolution.
        attention: whether self-attention follows.
        channels_per_head: attention width.
        dropout: probability.
        res_balance, attn_balance: share of the residual branch and of the attention in their sums.
        clip_act: activations are clipped to [-clip_act, clip_act]; None for no clipping.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        flavor: str,
        resample: str = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        self.flavor, self.resample, self.dropout = flavor, resample, ImageDropout(dropout)
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.num_heads = num_heads(out_channels, channels_per_head) if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        res_channels = out_channels if flavor == "enc" else in_channels
        self.conv_res0 = MPConv(res_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        if self.num_heads:
            self.attn_qkv = MPConv(out_channels, out_channels * 3, (1, 1))
            self.attn_proj = MPConv(out_channels, out_channels, (1, 1))

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # The checkpoints lay the channels out as [heads, C / heads, 3]: q, k and v are interleaved.
        qkv = self.attn_qkv(x).reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        q, k, v = normalize(qkv, dim=[2]).permute(3, 0, 1, 4, 2)  # each [B, heads, HW, C / heads]
        a = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.attn_proj(a.transpose(2, 3).reshape(x.shape))
        return out

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x [B, in_channels, H, W] and emb [B, emb_channels] to [B, out_channels, H', W']."""
        x = _resample(x, self.resample)
        if self.flavor == "enc":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=[1])  # pixel norm
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c[:, :, None, None].to(y.dtype))
        y = self.conv_res1(self.dropout(y))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attend(x), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)


class EDM2UNet(nn.Module):
    """EDM2 network F(x, c_noise, labels): [B, C, R, R] to [B, C, R, R].

    Args:
        img_resolution: R, divisible by 2**(len(channel_mult) - 1).
        img_channels: C.
        label_dim: number of classes K; 0 for an unconditional network.
        model_channels: base width.
        channel_mult: width multiplier per resolution, highest resolution first.
        channel_mult_noise: width of the noise embedding over the base width; None for the first level's width.
        channel_mult_emb: width of the embedding over the base width; None for the widest level's.
        num_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention.
        label_balance: share of the class embedding against the noise embedding.
        concat_balance: share of the skip connections against the main path.
        label_dropout: share of labels that training zeroes, for classifier-free guidance.
        channels_per_head, dropout, res_balance, attn_balance, clip_act: as in `Block`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        label_dropout: float = 0.0,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        cnoise = model_channels * channel_mult_noise if channel_mult_noise is not None else widths[0]
        cemb = model_channels * channel_mult_emb if channel_mult_emb is not None else max(widths)
        self.label_dim, self.label_dropout = label_dim, label_dropout
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb)
        self.emb_label = MPConv(label_dim, cemb) if label_dim else None

        def block(layer: Layer, flavor: str, attention: bool) -> Block:
            return Block(
                layer.cin, layer.cout, cemb, flavor=flavor, resample=layer.kind, attention=attention,
                channels_per_head=channels_per_head, dropout=dropout,
                res_balance=res_balance, attn_balance=attn_balance, clip_act=clip_act,
            )  # fmt: skip

        # A channel of ones beside the image stands in for the biases.
        encoder, decoder = unet_layout(img_resolution, img_channels + 1, widths[0], widths, num_blocks)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[encoder[0].name] = MPConv(img_channels + 1, widths[0], (3, 3))
        for layer in encoder[1:]:
            self.enc[layer.name] = block(layer, "enc", layer.kind == "block" and layer.res in attn_resolutions)
        for layer in decoder:
            attention = layer.kind == "in0" or (layer.kind == "block" and layer.res in attn_resolutions)
            self.dec[layer.name] = block(layer, "dec", attention)
        self.out_conv = MPConv(widths[0], img_channels, (3, 3))

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Embed c_noise [B] and labels [B, K] into [B, emb_channels]."""
        emb: Tensor = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None and labels is not None:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(self.label_dim)), self.label_balance)
        return mp_silu(emb)

    def encode(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Encoded:
        """Run the embedding and the encoder; arguments as in `forward`."""
        emb = self.embed(c_noise, labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        return Encoded(x, tuple(skips), emb)

    def advance(self, encoded: Encoded, layers: int) -> Encoded:
        """Run the decoder until `layers` of its layers are done."""
        x, skips = encoded.x, list(encoded.skips)
        for name, layer in list(self.dec.items())[encoded.layer : layers]:
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = layer(x, encoded.emb)
        return Encoded(x, tuple(skips), encoded.emb, layers)

    def decode(self, encoded: Encoded) -> Tensor:
        """Run what is left of the decoder."""
        x = self.advance(encoded, len(self.dec)).x
        out: Tensor = self.out_conv(x, gain=self.out_gain)
        return out

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Evaluate the raw network; x [B, C, R, R], c_noise [B], labels [B, K]; EDM2 has no augmentation."""
        return self.decode(self.encode(x, c_noise, labels, augment_labels))
