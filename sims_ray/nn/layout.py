"""The order and widths of a U-Net's layers, which all networks here share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Layer(NamedTuple):
    """One layer of a U-Net.

    Attributes:
        res: resolution of its output.
        kind: 'conv', 'down' or 'block' in the encoder; 'in0', 'in1', 'up' or 'block' in the decoder.
        number: of a block among those of its resolution, otherwise 0.
        cin, cout: widths; a decoder block's `cin` counts the skip connection that is joined to its input.
    """

    res: int
    kind: str
    number: int
    cin: int
    cout: int

    @property
    def name(self) -> str:
        """Its name in the public checkpoints."""
        return f"{self.res}x{self.res}_{self.kind}{self.number if self.kind == 'block' else ''}"


def unet_layout(
    img_resolution: int, in_channels: int, stem: int, widths: Sequence[int], num_blocks: int
) -> tuple[list[Layer], list[Layer]]:
    """Layers of the encoder and of the decoder.

    Args:
        img_resolution: resolution of the image.
        in_channels: channels of the first convolution's input.
        stem: channels of its output.
        widths: channels per resolution, highest first.
        num_blocks: blocks per resolution in the encoder; the decoder has one more.
    """
    encoder = [Layer(img_resolution, "conv", 0, in_channels, stem)]
    cout = stem
    for level, width in enumerate(widths):
        res = img_resolution >> level
        if level:
            encoder.append(Layer(res, "down", 0, cout, cout))
        for i in range(num_blocks):
            encoder.append(Layer(res, "block", i, cout, width))
            cout = width
    skips = [layer.cout for layer in encoder]
    lowest = img_resolution >> (len(widths) - 1)
    decoder = [Layer(lowest, kind, 0, cout, cout) for kind in ("in0", "in1")]
    for level, width in reversed(list(enumerate(widths))):
        res = img_resolution >> level
        if res != lowest:
            decoder.append(Layer(res, "up", 0, cout, cout))
        for i in range(num_blocks + 1):
            decoder.append(Layer(res, "block", i, cout + skips.pop(), width))
            cout = width
    return encoder, decoder
