"""DDPM++ U-Net (Song et al. 2021, arXiv 2011.13456) as configured by EDM (arXiv 2206.00364, App. F).

Parameter names are those of the public EDM checkpoints, so that weights load key for key. Written
from the papers; only the "positional / standard / standard" (DDPM++) variant lives here.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS_PER_GROUP = 4
MAX_GROUPS = 32
SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a residual sum at that of its terms
GROUP_NORM_EPS = 1e-6
EMBEDDING_MULT = 4  # width of the noise embedding over model_channels


def _xavier_uniform(shape: Sequence[int], fan_in: int, fan_out: int, gain: float) -> nn.Parameter:
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return nn.Parameter((torch.rand(*shape) * 2 - 1) * bound * gain)


class Linear(nn.Module):
    """Affine map with Xavier-uniform weights and zero bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = _xavier_uniform([out_features, in_features], in_features, out_features, 1.0)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_features] to [B, out_features]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Same-size convolution, optionally after 2x down- or up-sampling with a separable filter.

    `kernel=0` leaves out the convolution and only resamples.
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
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down = up, down
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            fan = kernel**2
            self.weight = _xavier_uniform(
                [out_channels, in_channels, kernel, kernel], in_channels * fan, out_channels * fan, gain
            )
            self.bias = nn.Parameter(torch.zeros(out_channels))
        if up or down:
            taps = torch.as_tensor(filter_taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])

    def _resample(self, x: Tensor) -> Tensor:
        taps = self.resample_filter.to(x.dtype)
        pad = (taps.shape[-1] - 1) // 2
        taps = taps.expand(self.in_channels, 1, -1, -1)
        if self.up:  # zero insertion divides the mean by 4
            return F.conv_transpose2d(x, taps * 4, stride=2, padding=pad, groups=self.in_channels)
        return F.conv2d(x, taps, stride=2, padding=pad, groups=self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H', W'] with H' = H, 2H or H/2."""
        if self.up or self.down:
            x = self._resample(x)
        if self.weight is None or self.bias is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.weight.shape[-1] // 2)


class GroupNorm(nn.Module):
    """Group normalisation over min(32, channels / 4) groups, or fewer where those do not divide the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        most = min(MAX_GROUPS, channels // CHANNELS_PER_GROUP)
        self.groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), GROUP_NORM_EPS)


class UNetBlock(nn.Module):
    """Residual block with noise conditioning by addition and optional single-head self-attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        dropout: float = 0.0,
        filter_taps: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.dropout = in_channels, out_channels, dropout
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, filter_taps=filter_taps)
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5)
        self.skip: Conv2d | None = None
        if in_channels != out_channels or up or down:
            self.skip = Conv2d(in_channels, out_channels, 1, up=up, down=down, filter_taps=filter_taps)
        self.attention = attention
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, gain=1e-5)

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # The checkpoints interleave q, k, v along the channel axis: [C, 3] rather than [3, C].
        qkv = self.qkv(self.norm2(x)).reshape(batch, channels, 3, height * width)
        q, k, v = qkv.permute(2, 0, 3, 1).unsqueeze(2)  # each [B, 1, HW, C]
        a = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(a.squeeze(1).transpose(1, 2).reshape(x.shape))
        return out

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x [B, in_channels, H, W] and emb [B, emb_channels] to [B, out_channels, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        if self.attention:
            x = (self._attend(x) + x) * SKIP_SCALE
        return x


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding of a scalar: [B] to [B, channels], sines before cosines."""

    def __init__(self, channels: int, max_positions: int = 10000) -> None:
        super().__init__()
        self.channels, self.max_positions = channels, max_positions

    def forward(self, x: Tensor) -> Tensor:
        """Embed c_noise [B]."""
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x.device) / (half - 1)
        angles = x.to(torch.float32).outer((1 / self.max_positions) ** exponent)
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)


class SongUNet(nn.Module):
    """DDPM++ network F(x, c_noise, labels): [B, C, R, R] to [B, C, R, R].

    Args:
        img_resolution: R, divisible by 2**(len(channel_mult) - 1).
        img_channels: C.
        label_dim: number of classes K; 0 for an unconditional network.
        augment_dim: width of the augmentation label (EDM: 9); 0 for none.
        model_channels: base width.
        channel_mult: width multiplier per resolution, highest resolution first.
        num_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention.
        dropout: dropout probability inside the residual blocks.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        self.label_dim = label_dim
        emb_channels = model_channels * EMBEDDING_MULT
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_label = Linear(label_dim, model_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        def block(cin: int, cout: int, res: int, *, attention: bool | None = None, **resample: bool) -> UNetBlock:
            attend = res in attn_resolutions if attention is None else attention
            return UNetBlock(
                cin, cout, emb_channels, attention=attend, dropout=dropout, filter_taps=resample_filter, **resample
            )

        self.enc = nn.ModuleDict()
        widths = [model_channels * mult for mult in channel_mult]
        resolutions = [img_resolution >> level for level in range(len(widths))]
        cout = model_channels
        skips = []
        for level, (res, width) in enumerate(zip(resolutions, widths, strict=True)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(img_channels, cout, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, res, attention=False, down=True)
            skips.append(cout)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(cout, width, res)
                cout = width
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, res, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout, res, attention=False)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, res, attention=False, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(cout + skips.pop(), width, res, attention=attention)
                cout = width
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = GroupNorm(cout)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv2d(cout, img_channels, 3, gain=1e-5)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Embed c_noise [B], labels [B, K] and augment_labels [B, A] into [B, emb_channels]."""
        emb = self.map_noise(c_noise)
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Evaluate the raw network; x [B, C, R, R], c_noise [B], labels [B, K], augment_labels [B, A]."""
        emb = self.embed(c_noise, labels, augment_labels)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, UNetBlock):
                if layer.in_channels != x.shape[1]:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
            elif isinstance(layer, GroupNorm):
                x = F.silu(layer(x))
            else:
                x = layer(x)
        return x
