"""Attention of a few queries, which the cpu backend reads keys for as they lie: the bits that it has among many."""

import pytest
import torch
from test_cpu_isa import usable

from uvg_engine import backends, ops
from uvg_engine.backends import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))
MANY = 13  # queries: more than are few


def made(kind, keys, heads, width):
    g = torch.Generator().manual_seed(keys * width)
    q, k, v = (torch.randn(rows, heads, width, generator=g) for rows in (MANY, keys, keys))
    if kind == "references":  # rows that ask for one, in the first block of keys or later, beside rows that do not
        q[::2] *= 40
        k[keys // 2 :] *= 10
    if kind == "small":
        q, k = q.abs() * 20, -k.abs() * 20
    if kind == "infinite":
        k[keys // 3, :, 0], v[0] = float("inf"), float("nan")
    return q, k, v


def bits(x):
    """Of the values; all NaN are one, whose sign no kernel promises."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32)


def on_threads(call, *numbers):
    """What a call gives on each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for number in numbers:
            torch.set_num_threads(number)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


@pytest.mark.parametrize("kind", ["plain", "references", "small", "infinite"])
@pytest.mark.parametrize("keys", [1, 16, 70, 257, 600])
@pytest.mark.parametrize("heads, width", [(1, 128), (3, 16), (2, 80), (2, 33)])
def test_few_queries_have_the_bits_of_many(kind, keys, heads, width, isa_restored):
    q, k, v = made(kind, keys, heads, width)
    spans = torch.tensor([[[keys - keys // 3, keys // 3], [0, keys - keys // 3]]], dtype=torch.int32)  # out of order
    for isa in usable():
        native.core().use_isa(isa)
        with backends.force("cpu"):
            out, lse = ops.flash_attention(q, k, v, torch.tensor([[[0, MANY]]], dtype=torch.int32), spans)
            for few in range(1, 9):
                for first in (0, MANY - few):
                    rows = slice(first, first + few)
                    got = ops.flash_attention(q[rows], k, v, torch.tensor([[[0, few]]], dtype=torch.int32), spans)
                    assert torch.equal(bits(got[0]), bits(out[rows]))
                    assert torch.equal(bits(got[1]), bits(lse[:, rows]))


def test_few_and_many_queries_in_one_call(isa_restored):
    """Samples of both kinds, one without keys, on one and on several threads: each has the bits that it has alone."""
    q, k, v = made("references", 600, 2, 64)
    q = torch.cat([q, q * 0.5])
    q_spans = torch.tensor([[[0, 2]], [[5, 13]], [[2, 3]], [[18, 1]]], dtype=torch.int32)
    k_spans = torch.tensor([[[300, 300]], [[0, 300]], [[0, 0]], [[0, 600]]], dtype=torch.int32)
    for isa in usable():
        native.core().use_isa(isa)
        with backends.force("cpu"):
            seen = on_threads(lambda: ops.flash_attention(q, k, v, q_spans, k_spans), 1, 2, 3)
            for spans in zip(q_spans, k_spans, strict=True):
                rows = slice(int(spans[0][0, 0]), int(spans[0].sum()))
                alone = ops.flash_attention(q, k, v, *(x[None] for x in spans))
                for out, lse in seen:
                    assert torch.equal(bits(out[rows]), bits(alone[0][rows]))
                    assert torch.equal(bits(lse[:, rows]), bits(alone[1][:, rows]))
            assert not seen[0][0][2:5].any() and torch.isneginf(seen[0][1][:, 2:5]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_few_and_many_queries_in_one_call(dtype, isa_restored):
    """Each sample's are those that it has alone, on any number of threads; the last ones, few and many, may be cut."""
    lengths, lengths_k = (9, 8, 1, 13, 3, 2, 9), (97, 200, 17, 300, 0, 120, 260)
    ends, ends_k = torch.tensor(lengths).cumsum(0), torch.tensor(lengths_k).cumsum(0)
    spans = [
        torch.stack([end - torch.tensor(count), torch.tensor(count)], 1)[:, None].int()
        for end, count in ((ends, lengths), (ends_k, lengths_k))
    ]
    g = torch.Generator().manual_seed(0)
    sizes = int(ends[-1]), int(ends_k[-1]), int(ends_k[-1])
    qkv = [torch.randn(rows, 3, 33, generator=g).to(dtype).requires_grad_() for rows in sizes]
    dout = torch.randn(sizes[0], 3, 33, generator=g).to(dtype)

    def gradients(*tables):
        out, _ = ops.flash_attention(*qkv, *tables)
        return torch.autograd.grad(out, qkv, dout)

    for isa in usable():
        native.core().use_isa(isa)
        with backends.force("cpu"):
            seen = on_threads(lambda: gradients(*spans), 1, 2, 3, 8)
            for table, table_k in zip(*spans, strict=True):
                alone = gradients(table[None], table_k[None])
                for got in seen:
                    for x, want, (start, count) in zip(got, alone, (table[0], table_k[0], table_k[0]), strict=True):
                        assert torch.equal(x[start : start + count], want[start : start + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_beside_samples_that_share_keys(dtype, isa_restored):
    """Whoever shares keys changes the gradients of these keys, and no bit of anything else."""
    q_spans = torch.tensor([[[0, 3]], [[3, 9]], [[12, 5]], [[17, 11]], [[28, 2]], [[30, 9]]], dtype=torch.int32)
    own = torch.tensor([[[0, 40]], [[40, 130]], [[170, 60]], [[230, 150]], [[380, 0]], [[380, 20]]], dtype=torch.int32)
    sharing = own.clone()
    sharing[3, 0], sharing[5, 0] = torch.tensor([210, 170]), torch.tensor([225, 10])  # keys of samples 2 and 3
    g = torch.Generator().manual_seed(4)
    q, k, v, dout = (torch.randn(rows, 2, 72, generator=g).to(dtype) for rows in (39, 400, 400, 39))

    def gradients(rows, spans, k_spans):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = ops.flash_attention(*leaves, spans, k_spans)
        return torch.autograd.grad(out[rows], leaves, dout[rows])

    for isa in usable():
        native.core().use_isa(isa)
        with backends.force("cpu"):
            seen = on_threads(lambda: gradients(slice(None), q_spans, sharing), 1, 3)
            for s in range(len(q_spans)):
                rows = slice(int(q_spans[s, 0, 0]), int(q_spans[s].sum()))
                first, count = sharing[s, 0].tolist()
                alone = gradients(rows, q_spans[s, None], sharing[s, None])
                here = [row for row in range(first, first + count) if not (s > 1 and 210 <= row < 235)]  # nobody else's
                for got in seen:
                    assert torch.equal(got[0][rows], alone[0][rows]), (isa, s)
                    for i in (1, 2):
                        assert torch.equal(got[i][here], alone[i][here]), (isa, s, i)
        assert not seen[0][1][380:].any() and not seen[0][2][380:].any()
