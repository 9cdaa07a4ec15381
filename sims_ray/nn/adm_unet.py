"""ADM U-Net of Dhariwal & Nichol 2021 (arXiv 2105.05233) as configured by EDM (arXiv 2206.00364, App. F).

Parameter names are those of the public EDM checkpoints. Written from the papers.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sims_ray.nn.layers import (
    ZERO,
    BlockStyle,
    Conv2d,
    Encoded,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    drop_labels,
)

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
        label_dropout: share of labels zeroed in training, for classifier-free guidance.
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

        def block(cin: int, cout: int, *, attention: bool = False, **resample: bool) -> UNetBlock:
            return UNetBlock(cin, cout, emb_channels, style, attention=attention, **resample)

        self.enc = nn.ModuleDict()
        widths = [model_channels * mult for mult in channel_mult]
        resolutions = [img_resolution >> level for level in range(len(widths))]
        cout = widths[0]
        skips = []
        for level, (res, width) in enumerate(zip(resolutions, widths, strict=True)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(img_channels, cout, 3, init=init)
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
            skips.append(cout)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(cout, width, attention=res in attn_resolutions)
                cout = width
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(cout + skips.pop(), width, attention=attention)
                cout = width
        self.out_norm = GroupNorm(cout, EPS)
        self.out_conv = Conv2d(cout, img_channels, 3, init=ZERO)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Embed c_noise [B], labels [B, K] and augment_labels [B, A] into [B, emb_channels]."""
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(drop_labels(labels, self.label_dropout, self.training))
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
