"""U-Nets of Song et al. 2021 (arXiv 2011.13456) as configured by EDM (arXiv 2206.00364, App. F).

One class, two published settings: DDPM++ (positional embedding, plain encoder) and NCSN++ (Fourier
embedding, residual image pyramid in the encoder). Written from the papers.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sims_ray.nn.embeddings import FourierEmbedding, PositionalEmbedding
from sims_ray.nn.layers import (
    BlockStyle,
    Conv2d,
    Encoded,
    GroupNorm,
    Init,
    Linear,
    UNetBlock,
)
from sims_ray.nn.layout import Layer, unet_layout

EPS = 1e-6
NEAR_ZERO = Init(weight=1e-5)
CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


class SongUNet(nn.Module):
    """DDPM++ or NCSN++ network F(x, c_noise, labels): [B, C, R, R] to [B, C, R, R].

    Args:
        img_resolution: R, divisible by 2**(len(channel_mult) - 1).
        img_channels: C.
        label_dim: number of classes K; 0 for an unconditional network.
        augment_dim: width of the augmentation label (EDM: 9); 0 for none.
        model_channels: base width.
        channel_mult: width multiplier per resolution, highest resolution first.
        channel_mult_emb: width of the embedding over the base width.
        num_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention.
        dropout: dropout probability inside the residual blocks.
        label_dropout: share of labels that training zeroes, for classifier-free guidance.
        embedding_type: 'positional' (DDPM++) or 'fourier' (NCSN++).
        channel_mult_noise: width of the noise embedding over the base width; 1 for DDPM++, 2 for NCSN++.
        encoder_type: 'standard' (DDPM++), 'residual' (NCSN++) or 'skip'.
        decoder_type: 'standard', or 'skip' for an image pyramid.
        resample_filter: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++.

    Raises:
        ValueError: a type that is not one of those.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        chosen = {"embedding_type": embedding_type, "encoder_type": encoder_type, "decoder_type": decoder_type}
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(CHOICES[name])}")
        self.label_dim, self.label_dropout = label_dim, label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        taps = tuple(resample_filter)
        style = BlockStyle(
            dropout, EPS, math.sqrt(0.5), False, None, True, taps, Init(), NEAR_ZERO, Init(weight=math.sqrt(0.2))
        )

        def block(layer: Layer, attention: bool) -> UNetBlock:
            up, down = layer.kind == "up", layer.kind == "down"
            return UNetBlock(layer.cin, layer.cout, emb_channels, style, up=up, down=down, attention=attention)

        widths = [model_channels * mult for mult in channel_mult]
        encoder, decoder = unet_layout(img_resolution, img_channels, model_channels, widths, num_blocks)
        self.enc = nn.ModuleDict()
        caux = img_channels
        for layer in encoder:
            if layer.kind == "conv":
                self.enc[layer.name] = Conv2d(layer.cin, layer.cout, 3)
                continue
            self.enc[layer.name] = block(layer, layer.kind == "block" and layer.res in attn_resolutions)
            name = f"{layer.res}x{layer.res}_aux"
            if layer.kind == "down" and encoder_type == "skip":
                self.enc[f"{name}_down"] = Conv2d(caux, caux, 0, down=True, filter_taps=taps)
                self.enc[f"{name}_skip"] = Conv2d(caux, layer.cout, 1)
            if layer.kind == "down" and encoder_type == "residual":
                self.enc[f"{name}_residual"] = Conv2d(caux, layer.cout, 3, down=True, filter_taps=taps, fused=True)
                caux = layer.cout

        self.dec = nn.ModuleDict()
        for layer in decoder:
            last = layer.kind == "block" and layer.number == num_blocks
            self.dec[layer.name] = block(layer, layer.kind == "in0" or (last and layer.res in attn_resolutions))
            if last and (decoder_type == "skip" or layer.res == img_resolution):
                name = f"{layer.res}x{layer.res}_aux"
                if decoder_type == "skip" and layer.res != decoder[0].res:
                    self.dec[f"{name}_up"] = Conv2d(img_channels, img_channels, 0, up=True, filter_taps=taps)
                self.dec[f"{name}_norm"] = GroupNorm(layer.cout, EPS)
                self.dec[f"{name}_conv"] = Conv2d(layer.cout, img_channels, 3, init=NEAR_ZERO)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Embed c_noise [B], labels [B, K] and augment_labels [B, A] into [B, emb_channels]."""
        emb = self.map_noise(c_noise)
        emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)  # these checkpoints put sines before cosines
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Encoded:
        """Run the embedding and the encoder; arguments as in `forward`."""
        emb = self.embed(c_noise, labels, augment_labels)
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return Encoded(x, tuple(skips), emb)

    def advance(self, encoded: Encoded, layers: int) -> Encoded:
        """Run the decoder until `layers` of its layers are done."""
        x, skips, image = encoded.x, list(encoded.skips), encoded.image
        for name, layer in list(self.dec.items())[encoded.layer : layers]:
            if isinstance(layer, UNetBlock):
                if layer.in_channels != x.shape[1]:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, encoded.emb)
            elif "aux_up" in name:
                image = layer(image)
            elif "aux_conv" in name:
                norm = self.dec[name.replace("aux_conv", "aux_norm")]
                part = layer(F.silu(norm(x)))
                image = part if image is None else part + image
        return Encoded(x, tuple(skips), encoded.emb, layers, image)

    def decode(self, encoded: Encoded) -> Tensor:
        """Run what is left of the decoder."""
        image = self.advance(encoded, len(self.dec)).image
        if image is None:
            raise RuntimeError("the decoder has no output layer")
        return image

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Evaluate the raw network; x [B, C, R, R], c_noise [B], labels [B, K], augment_labels [B, A]."""
        return self.decode(self.encode(x, c_noise, labels, augment_labels))
