"""SparseConv2d: torch.nn.Conv2d whose weight is mostly zeros, as the product of a SparseLinear.

What each output place sees of X becomes a row (im2col), ordered by kernel row, kernel column, channel: neighbours in
memory where X is channels-last, to which X is brought. Y is channels-last too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_kernels.nn.sparse_linear import SparseLinear
from lepton_kernels.scheme import QuantScheme

# Bytes of rows at a time: they should stay in the caches until they are multiplied.
_ROW_BYTES = 4 << 20


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"SparseConv2d: {name} is {value}; allowed: one or two numbers, each {least} or more")
    return pair[0], pair[1]


def rows_of_weight(weight: Tensor) -> Tensor:
    """A convolution's weight [out, in, height, width] as [out, height * width * in], the order of this file's rows."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def weight_of_rows(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of this shape, [out, in, height, width], whose rows_of_weight these are."""
    out, channels, height, width = shape
    return rows.reshape(out, height, width, channels).permute(0, 3, 1, 2).contiguous()


class SparseConv2d(nn.Module):
    """A drop-in for a pruned nn.Conv2d; see from_conv. Built empty, it waits for load_state_dict.

    padding: zeros (padding_mode: what else) around the last two dimensions of X, in nn.functional.pad's order: left,
    right, top, bottom.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        nonzeros: int,
        *,
        stride: int | Sequence[int] = 1,
        padding: Sequence[int] = (0, 0, 0, 0),
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        activation: str = "none",
        scheme: str | QuantScheme | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"SparseConv2d: in_channels is {in_channels}; allowed: 1 or more")
        if len(padding) != 4 or min(padding) < 0:
            raise ValueError(f"SparseConv2d: padding is {padding}; allowed: four numbers, each 0 or more")
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(
                f"SparseConv2d: padding_mode is {padding_mode!r}; allowed: 'zeros', 'reflect', 'replicate', 'circular'"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
        self.padding, self.padding_mode = tuple(padding), padding_mode
        columns = in_channels * math.prod(self.kernel_size)
        self.product = SparseLinear(columns, out_channels, nonzeros, bias, dtype, device, activation, scheme)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        pattern: str | None = None,
        scheme: str | QuantScheme | None = None,
        activation: str = "none",
    ) -> "SparseConv2d":
        """The copy of a Conv2d without its zeros (prune_ makes them), with `activation` after it.

        The arguments are those of SparseLinear.from_linear; a pattern (prune_ too) and the groups of a scheme are
        along this file's rows. `conv` is not changed. Raises ValueError for groups other than 1, and as
        SparseLinear.from_linear.
        """
        if conv.groups != 1:
            raise ValueError(f"SparseConv2d.from_conv: groups is {conv.groups}; allowed: 1")
        weight = conv.weight.detach()
        linear = nn.Linear(weight[0].numel(), conv.out_channels, conv.bias is not None, device="meta")
        linear.weight = nn.Parameter(rows_of_weight(weight), requires_grad=False)
        if conv.bias is not None:
            linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
        product = SparseLinear.from_linear(linear, pattern, scheme, activation)
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, 0, stride=conv.stride,
            padding=conv._reversed_padding_repeated_twice, dilation=conv.dilation, padding_mode=conv.padding_mode,
            activation=activation, scheme=scheme, device="meta",
        )  # fmt: skip
        layer.product = product
        return layer.train(conv.training)

    @property
    def nonzeros(self) -> int:
        """How many weights are stored."""
        return self.product.nonzeros

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_channels, in_channels, height, width], dequantized, made anew at every access."""
        return weight_of_rows(self.product.weight, (self.out_channels, self.in_channels, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; allowed: [batch, {self.in_channels}, height, width] or without batch"
            )
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if any(self.padding):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self.padding, mode)
        size = [
            (whole - dilation * (kernel - 1) - 1) // stride + 1
            for whole, kernel, stride, dilation in zip(
                x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        ]
        if min(size) < 1:
            raise ValueError(
                f"x has {tuple(x.shape[2:])} places, padding included; allowed: no fewer than the kernel's, "
                f"{self.kernel_size} with dilation {self.dilation}"
            )
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        if torch.compiler.is_exporting():  # the number of parts would fix the batch
            return self._multiply(x, size).permute(0, 3, 1, 2)
        image = math.prod(size) * self.product.in_features * x.element_size()
        parts = [self._multiply(part, size) for part in x.split(max(1, _ROW_BYTES // max(image, 1)))]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.permute(0, 3, 1, 2)

    def _multiply(self, x: Tensor, size: list[int]) -> Tensor:
        """X [batch, height, width, channels] to Y [batch, *size, out_channels]."""
        for dim, (kernel, stride, dilation) in enumerate(
            zip(self.kernel_size, self.stride, self.dilation, strict=True), 1
        ):
            x = x.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        rows = x.permute(0, 1, 2, 4, 5, 3).reshape(-1, self.product.in_features)
        return self.product(rows).reshape(-1, *size, self.out_channels)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, padding_mode={self.padding_mode!r}"
        )
