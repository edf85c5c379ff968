"""The kernels of the cpu backend in every instruction set that runs here, and with any number of threads.

What each op computes is tested in tests/ops, in the instruction set in use; here the others are held against it.
"""

import re
from pathlib import Path

import pytest
import torch

from uvg_engine import backends, ops
from uvg_engine.backends import native
from uvg_engine.model.embeddings import inverse_frequencies, rope_table

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))
HEADS, ROWS = 3, 300
WIDE = 114  # so wide that every kernel takes more than one thread
SPANS = torch.tensor([[0, 130], [130, 110], [240, 60]], dtype=torch.int32)
ATTENTION_SPANS = torch.tensor([[[0, 130], [240, 60]], [[130, 110], [0, 0]]], dtype=torch.int32)
ROPE_SPANS = torch.tensor([[0, 130, 0, 2, 5, 13], [130, 110, 0, 1, 10, 11], [240, 60, 1, 0, 0, 0]], dtype=torch.int32)


def usable():
    if native.cpu() is None:
        return []
    return [isa for isa in native.info()["cpu"]["supported"] if isa in native.info()["build"]["isa"]]


def results(width, dtype):
    """Outputs and gradients of every op, flat."""
    g = torch.Generator().manual_seed(width)

    def leaf(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    x, y, gate, shift, scale = (
        leaf(ROWS, width, dtype=dtype),
        leaf(ROWS, width, dtype=dtype),
        *(leaf(3, width) for _ in "abc"),
    )
    weight, bias = leaf(width), leaf(width)
    table = rope_table(width // HEADS, 64, inverse_frequencies(width // HEADS))
    experts = [leaf(2, 40, width), leaf(2, 40), leaf(2, width, 40), leaf(2, width)]
    layer = [leaf(70, width), leaf(70)]
    outs = [
        ops.modulated_layer_norm(x, shift, scale, SPANS, weight=weight, bias=bias),
        ops.gated_residual(x, y, gate, SPANS),
        *ops.gated_residual_norm(x, y, gate, SPANS, shift, scale, SPANS, weight=weight, bias=bias),
        *ops.qk_norm_rope(x, y, weight, bias, ROPE_SPANS, table, HEADS),
        ops.qk_norm_rope(y, None, weight, None)[0],
    ]
    heads = [part.unflatten(1, (HEADS, -1)) for part in (x, y, x + y)]
    outs.append(ops.flash_attention(*heads, ATTENTION_SPANS, ATTENTION_SPANS)[0].flatten(1))
    weights, picked = ops.moe_route(x[:, :5], 2)
    rows, _, order = ops.moe_dispatch(y, picked, 5)
    outs.append(ops.moe_combine(rows, order, weights))
    offsets = torch.tensor([0, 120, ROWS], dtype=torch.int32)
    outs.append(ops.moe_mlp(x, *(p.to(dtype) for p in experts), offsets))
    outs.append(ops.linear(x, *(p.to(dtype) for p in layer), activation="gelu_tanh"))
    douts = [torch.randn(out.shape, generator=g).to(dtype) for out in outs]
    leaves = [x, y, gate, shift, scale, weight, bias, *experts, *layer]
    grads = list(torch.autograd.grad(outs, leaves, douts))
    return [out.detach() for out in (*outs, *steps_of_both_streams(x.flatten(), y.flatten(), gate[:, :1]))], grads


def test_bytes_are_the_same_in_every_instruction_set(isa_restored):
    """Whole numbers that bytes hold as they are: sums without any rounding."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randint(256, (11, 3100), generator=g).float(), torch.randint(-127, 128, (70, 3100), generator=g)
    x[:, 0], x[:, 1], weight[:, 0] = 0, 255, 127
    for isa in usable():
        native.core().use_isa(isa)
        with backends.force("cpu"):
            assert torch.equal(ops.linear_int8(x, weight.float()), (x.long() @ weight.long().T).float())


def steps_of_both_streams(x, velocity, numbers):
    """Results of flow_noise and flow_step on three samples, one thread's work and more."""
    lengths = SPANS * (len(x) // ROWS)
    share, seeds, tokens = numbers.sigmoid().flatten(), torch.tensor([5, -(2**40), 7]), torch.arange(len(x)) % 1000
    noisy = ops.flow_noise(x, tokens, share, share, seeds, 3, lengths, lengths, 1000)
    coefs = torch.linspace(-1, 1, 30).view(3, 10)
    past = [velocity, 3 * share, coefs, x, velocity, x]
    return *noisy, *ops.flow_step(x, velocity, *past, lengths, tokens, noisy[2], share, seeds, seeds + 1, lengths)


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("width", [6, 54, 192])
def test_every_instruction_set_agrees_with_the_reference(isa, width, isa_restored):
    with backends.force("reference"):
        want = results(width, torch.float32)
    native.core().use_isa(isa)
    with backends.force("cpu"):
        got = results(width, torch.float32)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))


def sizes_of_one_thread():
    """Up to which sizes the kernels stay in one thread, by name."""
    text = (Path(__file__).parents[1] / "csrc/common/threads.h").read_text()
    return {name: int(size) for name, size in re.findall(r"constexpr int64_t kAlone(\w+) = (\d+);", text)}


def test_all_kernels_take_more_than_one_thread_in_the_test_of_threads():
    limits = sizes_of_one_thread()
    del limits["HeadProducts"]  # test_cpu_heads.py
    products = 120 * WIDE * 40 // 3  # the first expert's, for each of three threads
    sizes = dict.fromkeys(limits, ROWS * WIDE) | {"MoeRows": ROWS, "Products": products}
    assert limits and all(sizes[name] > limit for name, limit in limits.items())


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_threads(isa, dtype, isa_restored):
    native.core().use_isa(isa)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with backends.force("cpu"):
                seen.append(results(WIDE, dtype))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip((*seen[0][0], *seen[0][1]), (*other[0], *other[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_has_the_same_bits_alone_and_in_a_group(isa, dtype, isa_restored):
    """Norms take four rows at once where they can; which, depends on the neighbours."""
    g = torch.Generator().manual_seed(0)
    h, y, dout = (torch.randn(6, WIDE, generator=g).to(dtype) for _ in range(3))
    weight, bias = torch.randn(2, WIDE, generator=g)

    def results(rows):
        leaves = [h[rows].clone().requires_grad_(), y[rows].clone().requires_grad_()]
        outs = [
            ops.modulated_layer_norm(leaves[0], weight=weight, bias=bias),
            *ops.gated_residual_norm(*leaves, weight=weight, bias=bias),
            *ops.qk_norm_rope(*leaves, weight, bias),
        ]
        grads = torch.autograd.grad(outs, leaves, [dout[rows]] * len(outs))
        return [out.detach() for out in outs] + list(grads)

    native.core().use_isa(isa)
    with backends.force("cpu"):
        whole = results(slice(None))
        for row in range(6):
            alone = results(slice(row, row + 1))
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_results_have_the_bits_of_small_ones(dtype):
    """Results of 8 MiB and more are stored past the cache: rows at both ends against calls with those rows alone."""
    g = torch.Generator().manual_seed(0)
    h, y, dh, dn = (torch.randn(4224, 1024, generator=g).to(dtype) for _ in range(4))
    part = torch.randn(3, 1, 1024, generator=g)

    def results(rows):
        leaves = [h[rows].clone().requires_grad_(), y[rows].clone().requires_grad_()]
        spans = torch.tensor([[0, len(leaves[0])]], dtype=torch.int32)
        out, normed = ops.gated_residual_norm(*leaves, part[0], spans, part[1], part[2], spans)
        plain, other = ops.gated_residual(*leaves, part[0], spans), ops.modulated_layer_norm(leaves[0])
        grads = (torch.autograd.grad(o, leaves[:n], d[rows]) for o, n, d in ((plain, 2, dh), (other, 1, dn)))
        both = torch.autograd.grad((out, normed), leaves, (dh[rows], dn[rows]))
        queries, keys = ops.qk_norm_rope(*leaves, part[0, 0], part[1, 0])
        heads = torch.autograd.grad((queries, keys), leaves, (dh[rows], dn[rows]))
        outs = [t.detach() for t in (out, normed, plain, other, queries, keys)]
        return outs + [t for pair in (*grads, both, heads) for t in pair]

    with backends.force("cpu"):
        whole = results(slice(None))
        for rows in (slice(0, 70), slice(-70, None)):
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, results(rows), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_results_of_narrow_heads_have_the_bits_of_small_ones(dtype):
    """Heads of 16 are no whole vectors where text turns their halves: value by value, and not past the cache."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4224, 1024, generator=g).to(dtype) for _ in range(2))
    table, weight = rope_table(16, 4154, inverse_frequencies(16)), torch.randn(2, 1024, generator=g)

    def results(rows, *spans):
        table_of_spans = torch.tensor([[*span, 1, 0, 0, 0] for span in spans], dtype=torch.int32)
        return ops.qk_norm_rope(q[rows], k[rows], *weight, table_of_spans, table, 64)

    with backends.force("cpu"):
        whole = results(slice(None), (0, 4154), (4154, 70))
        for rows in (slice(0, 70), slice(-70, None)):
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, results(rows, (0, 70)), strict=True))


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_far_from_0(isa, dtype, isa_restored):
    """Nothing is left of a large negative value, and minus infinity is no number, as in torch."""
    native.core().use_isa(isa)
    x = torch.tensor([0.0, 20.0, 1e4, 1e20, 3e38, torch.inf], dtype=dtype)
    x = torch.cat([x, -x])[:, None]
    with backends.force("cpu"):
        got = ops.linear(x, torch.ones(1, 1, dtype=dtype), activation="gelu_tanh")
    want = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-30, equal_nan=True)


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="UVG_CPU_ISA must be one of"):
        native.core().use_isa("sse9")
