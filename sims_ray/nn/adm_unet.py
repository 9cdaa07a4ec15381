"""ADM U-Net of Dhariwal & Nichol 2021 (arXiv 2105.05233) as configured by EDM (arXiv 2206.00364, App. F).

Parameter names are those of the public EDM checkpoints. Written from the papers.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sims_ray.nn.embeddings import PositionalEmbedding
from sims_ray.nn.layers import (
    ZERO,
    BlockStyle,
    Conv2d,
    Encoded,
    GroupNorm,
    Init,
    Linear,
    UNetBlock,
)
from sims_ray.nn.layout import Layer, unet_layout

EPS = 1e-5
THIRD = math.sqrt(1 / 3)


class DhariwalUNet(nn.Module):
    """ADM network F(x, c_noise, labels): [B, C, R, R] to [B, C, R, R].

    Args:
        img_resolution: R, divisible by 2**(len(channel_mult) - 1).
        img_channels: C.
        label_dim: number of classes K; 0 for an unconditional network.
        augment_dim: width of the augmentation label; 0 for none.
        model_channels: base width.
        channel_mult: width multiplier per resolution, highest resolution first.
        channel_mult_emb: width of the embedding over the base width.
        num_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention.
        dropout: dropout probability inside the residual blocks.
        label_dropout: share of labels that training zeroes, for classifier-free guidance.
        channels_per_head: attention width.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        channels_per_head: int = 64,
    ) -> None:
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", THIRD, THIRD)
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=ZERO) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        label_init = Init("kaiming_normal", math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=label_init) if label_dim else None
        style = BlockStyle(dropout, EPS, 1.0, True, channels_per_head, False, (1, 1), init, ZERO, init)

        def block(layer: Layer, attention: bool) -> UNetBlock:
            up, down = layer.kind == "up", layer.kind == "down"
            return UNetBlock(layer.cin, layer.cout, emb_channels, style, up=up, down=down, attention=attention)

        widths = [model_channels * mult for mult in channel_mult]
        encoder, decoder = unet_layout(img_resolution, img_channels, widths[0], widths, num_blocks)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[encoder[0].name] = Conv2d(img_channels, widths[0], 3, init=init)
        for layer in encoder[1:]:
            self.enc[layer.name] = block(layer, layer.kind == "block" and layer.res in attn_resolutions)
        for layer in decoder:
            attention = layer.kind == "in0" or (layer.kind == "block" and layer.res in attn_resolutions)
            self.dec[layer.name] = block(layer, attention)
        self.out_norm = GroupNorm(widths[0], EPS)
        self.out_conv = Conv2d(widths[0], img_channels, 3, init=ZERO)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Embed c_noise [B], labels [B, K] and augment_labels [B, A] into [B, emb_channels]."""
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels)
        return F.silu(emb)

    def encode(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Encoded:
        """Run the embedding and the encoder; arguments as in `forward`."""
        emb = self.embed(c_noise, labels, augment_labels)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        return Encoded(x, tuple(skips), emb)

    def advance(self, encoded: Encoded, layers: int) -> Encoded:
        """Run the decoder until `layers` of its layers are done."""
        x, skips = encoded.x, list(encoded.skips)
        for name, layer in list(self.dec.items())[encoded.layer : layers]:
            if "block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, encoded.emb)
        return Encoded(x, tuple(skips), encoded.emb, layers)

    def decode(self, encoded: Encoded) -> Tensor:
        """Run what is left of the decoder."""
        x = self.advance(encoded, len(self.dec)).x
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Evaluate the raw network; x [B, C, R, R], c_noise [B], labels [B, K], augment_labels [B, A]."""
        return self.decode(self.encode(x, c_noise, labels, augment_labels))
