"""Span tables in plain PyTorch. A span is (start, len): a run of rows of the packed token matrix."""

from __future__ import annotations

import torch


def span_rows(spans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unroll spans to the rows that they cover, in span order.

    spans: int32 [S, 2] of (start, len).
    Returns int64 (span [M], offset [M], row [M]): the span, the place inside it and the place in the buffer.
    """
    starts, lengths = spans.long().unbind(1)
    owner = torch.repeat_interleave(torch.arange(len(spans), device=spans.device), lengths)
    first = torch.cumsum(lengths, 0) - lengths
    offset = torch.arange(len(owner), device=spans.device) - first[owner]
    return owner, offset, starts[owner] + offset


def per_row(values: torch.Tensor, spans: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Spread one value per span over its rows.

    values: [S, ...]. spans: int32 [S, 2]. Returns [num_rows, ...]; rows that no span covers are zero.
    """
    owner, _, rows = span_rows(spans)
    if len(rows) == num_rows and bool((rows == torch.arange(num_rows, device=rows.device)).all()):
        return values[owner]
    return values.new_zeros((num_rows, *values.shape[1:])).index_copy(0, rows, values[owner])


def sum_rows(rows: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Sum the rows of each span: [T, D] -> [S, D]. The adjoint of `per_row`."""
    sums, place, spans_list = [], 0, spans.tolist()
    while place < len(spans_list):  # neighbours of one length are summed in one call
        start, length = spans_list[place]
        count = 1
        while place + count < len(spans_list) and spans_list[place + count] == [start + count * length, length]:
            count += 1
        sums.append(rows[start : start + count * length].unflatten(0, (count, length)).sum(1))
        place += count
    return torch.cat(sums) if sums else rows.new_zeros((0, rows.shape[1]))


def rows_of(spans: torch.Tensor) -> torch.Tensor:
    """Row indices of the union of one sample's spans, in span order. spans: int32 [M, 2]. Returns int64 [rows]."""
    pieces = [torch.arange(start, start + length, device=spans.device) for start, length in spans.tolist() if length]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device=spans.device)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and sums run in fp32 at least; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
