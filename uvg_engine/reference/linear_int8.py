"""A linear layer whose product is in bytes. Letters: T rows, D width of a row, F width of a result.

What is rounded to bytes is rounded in fp32 whatever the dtype, so that all backends have the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST_RANGE = 1e-30  # of the values of a row: with less its scale would have no inverse


def unsigned(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers [T, D], scale [T, 1] fp32) of rows: 255 steps from the least value (or 0) to the greatest (or 0).

    A row that holds a NaN or an infinity has NaN as its scale.
    """
    x = x_TD.float()
    low, high = torch.cat([x, x.new_zeros(len(x), 1)], 1).aminmax(dim=1, keepdim=True)
    span = (high - low).clamp_min(LEAST_RANGE)
    steps = x.new_tensor(255)  # divided as a tensor: a number's division may be a multiplication by its inverse
    by = steps / span
    offset = (-low * by).round()
    return ((x * by).round() + offset).clamp_max(255) - offset, span / steps + _poison(x)


def signed(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers from -127 to 127 [T, D], scale [T, 1] fp32) of rows; NaN and infinities as in `unsigned`."""
    x = x_TD.float()
    span = torch.cat([x, x.new_zeros(len(x), 1)], 1).abs().amax(1, keepdim=True).clamp_min(LEAST_RANGE)
    most = x.new_tensor(127)
    return (x * (most / span)).round(), span / most + _poison(x)


def forward(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, activation: str) -> Tensor:
    """Returns y [T, F] in x's dtype. After the bytes all is in fp64, where their sums are exact."""
    (x, x_scale), (weight, scale) = unsigned(x_TD), signed(weight_FD)
    y = (x.double() @ weight.double().T) * scale.double().T * x_scale.double()
    y = y if bias_F is None else y + bias_F.double()
    return (functional.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y).to(x_TD.dtype)


def _poison(x_TD: Tensor) -> Tensor:
    return (x_TD * 0).sum(1, keepdim=True)
