"""What the benchmarks are made of: sizes, cases, peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uvg_engine.model import CONFIGS, Layout

IN_BYTES = 3e-2  # slack of what has its products in bytes
FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Size:
    """Of a batch and a model. Letters as in docs/design.md: B samples, T rows, D width, F hidden, N heads, V words."""

    model: str
    samples: int
    grid: tuple[int, int, int]
    text: int
    vocab: int

    @property
    def width(self) -> int:
        return CONFIGS[self.model].dim

    @property
    def hidden(self) -> int:
        return CONFIGS[self.model].ffn_dim

    @property
    def heads(self) -> int:
        return CONFIGS[self.model].heads

    @property
    def video(self) -> int:
        """Video rows of a sample."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def rows(self) -> int:
        return self.samples * (self.video + self.text)

    @property
    def layout(self) -> Layout:
        return Layout.build([self.grid] * self.samples, [self.text] * self.samples, [1] * self.samples)

    def by_modality(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Packed rows [T, ...] as dense (video [B, Lv, ...], text [B, Lt, ...])."""
        cut = self.samples * self.video
        return x[:cut].unflatten(0, (self.samples, self.video)), x[cut:].unflatten(0, (self.samples, self.text))


SIZES = {  # the vocabulary of 1.3b is cut where the head is not the point: 256 k words by 1536 are 1.5 GB in fp32
    "digits": Size("digits", samples=8, grid=(4, 4, 4), text=28, vocab=160),
    "digits-1": Size("digits", samples=1, grid=(4, 4, 4), text=28, vocab=160),
    "1.3b": Size("1.3b", samples=2, grid=(2, 8, 15), text=32, vocab=16384),
    "1.3b-2560": Size("1.3b", samples=1, grid=(4, 20, 32), text=256, vocab=16384),
    "1.3b-8192": Size("1.3b", samples=1, grid=(8, 32, 32), text=256, vocab=16384),
    "1.3b-vocab": Size("1.3b", samples=1, grid=(1, 8, 15), text=256, vocab=256_300),
    **{
        f"L{256 * frames}": Size("1.3b", samples=1, grid=(frames, 16, 16), text=0, vocab=16384)
        for frames in (4, 8, 16, 32, 64)
    },
}


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to the same result: `function(*inputs)`, with inputs in the form that suits it.

    function: a module where the op has weights, so that compilers may prepare them for inference. In a backward pass
    every input and every one of `parameters` that requires a gradient gets one. restore: the function's result as the
    op's first output, so that the two can be compared; outside the timing. weights: the module's parameters where the
    function hides its module.
    """

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    restore: Callable[[Any], Tensor] = lambda result: result[0] if isinstance(result, tuple) else result
    weights: tuple[Tensor, ...] = ()

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.weights or (tuple(self.function.parameters()) if isinstance(self.function, nn.Module) else ())


@dataclass(frozen=True)
class Case:
    """One op, or a block. make: its arguments, requiring a gradient where there is one.

    work: (flops, bytes) of a forward; those of the backward are `backward` times as many. peers: name in
    `bench.peers.PEERS` -> Peer from the size and the arguments. compiled_by: peers that take the code of the first
    one. name: of this variant of the op. sizes: those it is timed at if none is asked for. truth: what the others must
    equal on a device, a backend or a peer (where the reference would take too long). whole: made of many ops, so that
    "uvg" is what serves by itself. draws: the result is random, so that a peer's differs. agree: share of whole numbers
    in a result that have to equal the reference's. slack: how far results may be apart, as a share of the largest
    value, in place of the dtype's own.
    """

    call: Callable[..., Any]
    shape: Callable[[Size], str]
    make: Callable[[Size, torch.dtype], tuple[Any, ...]]
    work: Callable[[Size, int], tuple[float, float]]
    peers: Mapping[str, Callable[..., Peer]] = field(default_factory=dict)
    compiled_by: tuple[str, ...] = ("inductor",)
    name: str = ""
    sizes: tuple[str, ...] = ("1.3b",)
    passes: tuple[str, ...] = (FORWARD, BOTH)
    backward: tuple[float, float] = (2.0, 2.0)
    truth: Callable[[Size, str], str] = lambda size, device: "reference"
    whole: bool = False
    draws: bool = False
    agree: float = 1.0
    slack: float | None = None


def normal(dtype: torch.dtype, *shape: int, scale: float = 1.0, leaf: bool = True) -> Tensor:
    """Seeded normals; leaf: a gradient is wanted."""
    gen = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (torch.randn(*shape, generator=gen) * scale).to(dtype).requires_grad_(leaf)


def leaf(x: Tensor) -> Tensor:
    """x in a new form as a leaf of its own, where it was one."""
    return x.detach().contiguous().requires_grad_(x.requires_grad)


def joined(parts: tuple[Tensor, Tensor]) -> Tensor:
    """The inverse of `Size.by_modality`."""
    return torch.cat([part.flatten(0, 1) for part in parts])
