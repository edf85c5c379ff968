"""Samples for libraries that know no spans: their rows one after the other, with bounds (`cu_seqlens`).

Letters: B samples, M spans of a sample, T query rows, U key rows, N heads, H head width.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from uvg_engine.backends import devices

Table = tuple[tuple[tuple[int, int], ...], ...]  # [B][M] of (start, len)
_tables = WeakTensorKeyDictionary()  # its version, and the table; as an attribute copies and files would have them


@dataclass(frozen=True)
class Packed:
    """Rows of all samples, one sample after the other. rows: int64, those to take, or None where the buffer lies so
    already. bounds: int32 [B + 1], where each sample starts, and the end. lengths: rows of each sample."""

    rows: Tensor | None
    bounds: Tensor
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Rows of the longest sample; 0 without one."""
        return max(self.lengths, default=0)

    def each(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of each sample its bounds (int32 [0, rows]) and its rows of each tensor, as views."""
        bounds = (self.bounds[i : i + 2] - self.bounds[i] for i in range(len(self.lengths)))
        return zip(bounds, *(x.split(self.lengths) for x in tensors), strict=True)

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """The rows of x, packed."""
        return (x if self.rows is None else x.index_select(dim, self.rows)).contiguous()

    def put(self, x: Tensor, count: int, fill: float = 0.0, dim: int = 0) -> Tensor:
        """x's rows back at their places among `count`; the others are `fill`. No row may be named twice."""
        if self.rows is None:
            return x
        shape = (*x.shape[:dim], count, *x.shape[dim + 1 :])
        return x.new_full(shape, fill).index_copy_(dim, self.rows, x)

    def add(self, x: Tensor, count: int) -> Tensor:
        """As `put` with zeros, and a row that is named more than once gets the sum, in one order on every device."""
        if self.rows is None:
            return x
        total = torch.zeros((count, *x.shape[1:]), dtype=torch.float32, device=x.device)
        return total.index_put_((self.rows,), x.float(), accumulate=True).to(x.dtype)


def table_of(spans: Tensor) -> Table:
    """The numbers of an int32 table [B, M, 2].

    On a device the host waits for them once: they are kept with the tensor, until it is written to. A table made in
    inference mode has no version that would tell, nor does it tell of what a replayed graph writes: write to no such
    table.
    """
    version = 0 if spans.is_inference() else spans._version
    kept = _tables.get(spans)
    if kept is None or kept[0] != version:
        kept = version, tuple(tuple((start, length) for start, length in sample) for sample in spans.tolist())
        _tables[spans] = kept
    return kept[1]


def packed(q_spans: Tensor, k_spans: Tensor, num_q: int, num_k: int) -> tuple[Packed, Packed]:
    """Queries and keys of the samples that have both; the others' results are known."""
    return _packed(table_of(q_spans), table_of(k_spans), num_q, num_k, q_spans.device)


@functools.lru_cache(maxsize=64)
def _packed(queries: Table, keys: Table, num_q: int, num_k: int, device: torch.device) -> tuple[Packed, Packed]:
    def size(sample: tuple[tuple[int, int], ...]) -> int:
        return sum(length for _, length in sample)

    both = [(q, k) for q, k in zip(queries, keys, strict=True) if size(q) and size(k)]

    def pack(samples: list[tuple[tuple[int, int], ...]], count: int) -> Packed:
        rows = torch.tensor([r for s in samples for start, length in s for r in range(start, start + length)])
        whole = torch.equal(rows, torch.arange(count))
        lengths = tuple(size(s) for s in samples)
        bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
        return Packed(None if whole else rows.to(device), bounds, lengths)

    with torch.inference_mode(False):  # kept beyond the call
        return pack([q for q, _ in both], num_q), pack([k for _, k in both], num_k)


Attend = Callable[[Tensor, Tensor, Tensor, Packed, Packed, float], tuple[Tensor, Tensor]]
AttendBack = Callable[..., tuple[Tensor, Tensor, Tensor]]


def forward(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """reference.flash_attention.forward by attend(q, k, v, queries, keys, scale), of packed rows, which gives
    (out [T, N, H], lse [N, T])."""
    queries, keys = packed(q_spans, k_spans, len(q), len(k))
    if not queries.longest:
        return torch.zeros_like(q), q.new_full((q.shape[1], len(q)), -torch.inf, dtype=torch.float32)
    out, lse = attend(queries.take(q), keys.take(k), keys.take(v), queries, keys, scale)
    return queries.put(out, len(q)), queries.put(lse, len(q), -torch.inf, dim=1)


def backward(
    attend_back: AttendBack,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_spans: Tensor,
    k_spans: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """reference.flash_attention.backward by attend_back(dout, out, lse, q, k, v, queries, keys, scale)."""
    queries, keys = packed(q_spans, k_spans, len(q), len(k))
    if not queries.longest:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    asking = (queries.take(dout), queries.take(out), queries.take(lse, dim=1), queries.take(q))
    dq, dk, dv = attend_back(*asking, keys.take(k), keys.take(v), queries, keys, scale)
    return queries.put(dq, len(q)), keys.add(dk, len(k)), keys.add(dv, len(v))


def refuses(q: Tensor, widest: int) -> str | None:
    """Rules that the libraries share: an NVIDIA GPU of our age, 16-bit elements, heads of multiples of 8, no graph."""
    if q.device.type != "cuda":
        return f"tensors are on {q.device.type}"
    if torch.version.hip:
        return "the library's kernels are for NVIDIA GPUs"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}; have bfloat16, float16"
    if q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"head width {q.shape[-1]}; have multiples of 8 up to {widest}"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and the library wants the span tables on the host"
    return devices.too_old(q.device)


def library(module: str, package: str) -> tuple[Any, str | None]:
    """(the module, None), or (None, why it is not there). An import that fails for another reason is an error."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise
        return None, f"{package} is not installed"
    name = getattr(found, "__name__", module)
    if name.startswith("uvg_engine."):  # our compat in its place: the op would call itself
        return None, f"{module} is {name} here"
    return found, None
