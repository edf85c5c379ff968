"""Addresses past 2^31 elements of products, heads and flow ops; and that every kernel has met every far tensor."""

import os
import re

import pytest
import torch
from torch.nn import functional

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton runs kernels without a GPU only where TRITON_INTERPRET=1", allow_module_level=True)

from far_memory import ALL, BF16, END, FAR, FP32, KERNELS, LAST, far, far_arguments, run_part, with_end

from uvg_engine.backends import triton as backend
from uvg_engine.kernels import flow_noise, flow_step, linear_cross_entropy, linear_sample, moe_mlp
from uvg_engine.reference import flow_noise as noise_truth
from uvg_engine.reference import flow_step as step_truth
from uvg_engine.reference import linear_cross_entropy as cross_entropy_truth
from uvg_engine.reference import linear_sample as sample_truth
from uvg_engine.reference import moe_mlp as mlp_truth

__all__ = ["run_part"]
TWO = (slice(-2, None),)


def numbers():
    g = torch.Generator().manual_seed(0)
    return lambda *shape, scale=1.0: (scale * torch.randn(*shape, generator=g)).to(BF16)


def close(got, want):
    torch.testing.assert_close(got.to(FP32), want.to(FP32), rtol=0.02, atol=0.05)


def test_moe_mlp_rows(run_part, monkeypatch):
    """Many rows: the last tile of one expert and that of the other."""
    monkeypatch.setattr(moe_mlp, "programs", lambda device, held: FAR)  # one a tile
    normal, rows, width = numbers(), 2**24 + END, 128
    x, dy = (with_end(normal(END, width), rows, width) for _ in range(2))
    w1, b1, w2, b2 = (normal(*shape, scale=0.1) for shape in ((2, width, width), (2, width)) * 2)
    offsets = torch.tensor([0, rows - 5, rows], dtype=torch.int32)
    own = torch.tensor([0, END - 5, END], dtype=torch.int32)
    chosen = {"moe_mlp_rows": TWO, "moe_mlp_tile_sums": TWO, "moe_mlp_weights": (ALL,), "moe_mlp_bias": (ALL,)}
    y, pre = run_part(moe_mlp.forward, x, w1, b1, w2, b2, offsets, None, True, **chosen)
    ends = (x[-END:], w1, b1, w2, b2, own)
    want, want_pre = mlp_truth.forward(*ends, None, True)
    close(y[-END:], want)
    close(pre[-END:], want_pre)
    got = run_part(moe_mlp.backward, dy, pre, x, w1, b1, w2, b2, offsets, **chosen)
    wanted = mlp_truth.backward(dy[-END:], want_pre, *ends)
    close(got[0][-END:], wanted[0])
    for a, b in zip(got[1:], wanted[1:], strict=True):
        close(a, b)


def test_moe_mlp_experts(run_part, monkeypatch):
    """Many experts, of which the last has all rows."""
    monkeypatch.setattr(moe_mlp, "programs", lambda device, held: FAR)
    normal, experts, width, hidden = numbers(), 2**12, 1024 + 16, 512
    x, dy = normal(END, width), normal(END, width)
    w1, w2 = (with_end(normal(*n, scale=0.03), experts, *n) for n in ((hidden, width), (width, hidden)))
    b1, b2 = normal(experts, hidden), normal(experts, width)
    offsets = torch.zeros(experts + 1, dtype=torch.int32)
    offsets[-1] = END
    chosen = {"moe_mlp_rows": (slice(9),), "moe_mlp_tile_sums": (slice(1),), "moe_mlp_weights": (LAST,)}
    y, pre = run_part(moe_mlp.forward, x, w1, b1, w2, b2, offsets, None, True, **chosen)
    ends = (x, w1[-1:], b1[-1:], w2[-1:], b2[-1:], torch.tensor([0, END], dtype=torch.int32))
    want, want_pre = mlp_truth.forward(*ends, None, True)
    close(y, want)
    dx, *got = run_part(moe_mlp.backward, dy, pre, x, w1, b1, w2, b2, offsets, **chosen)
    want_dx, *wanted = mlp_truth.backward(dy, want_pre, *ends)
    close(dx, want_dx)
    for a, b in zip(got, wanted, strict=True):  # the end of the last tile
        close(a.reshape(experts, -1)[-1, -16:], b.flatten()[-16:])


def test_moe_mlp_sums(run_part, monkeypatch):
    """Sums of 4,096 tiles over 2^19 columns: those of the last expert and the last columns."""
    monkeypatch.setattr(moe_mlp, "programs", lambda device, held: FAR)
    normal, experts, each, columns = numbers(), 2**11, 65, 2**19 + 1024
    rows = experts * each
    offsets = torch.arange(0, rows + 1, each, dtype=torch.int32)
    dy, w2 = normal(rows, 1), with_end(normal(64), experts, 1, columns)
    pre = far(rows, columns)
    pre[-each:, -64:] = normal(each, 64)
    dpre, hidden, sums = run_part(
        moe_mlp._rows_product, dy, w2, None, offsets, moe_mlp.GELU_BACKWARD, False, pre, moe_mlp_rows=TWO
    )
    x = pre[-each:, -64:].float().requires_grad_()
    want = functional.gelu(x, approximate="tanh")
    (want_dpre,) = torch.autograd.grad(want, x, dy[-each:].float() * w2[-1, 0, -64:].float())
    close(hidden[-each:, -64:], want.detach())
    close(dpre[-each:, -64:], want_dpre)
    close(sums[2 * experts - 1, -64:], want_dpre[64])
    close(sums[2 * experts - 2, -64:], want_dpre[:64].sum(0))
    corner = (slice(2 * experts - 2, 2 * experts), LAST)
    again = run_part(moe_mlp._tile_sums, dpre, offsets, 64, moe_mlp_tile_sums=corner)
    torch.testing.assert_close(again[corner[0], -64:], sums[corner[0], -64:], rtol=0, atol=0.3)
    db1 = run_part(moe_mlp._bias_gradient, sums, far(experts, columns), offsets, 64, moe_mlp_bias=(LAST, LAST))
    close(db1[-1, -64:], want_dpre.sum(0))


def test_what_an_int32_must_count_is_refused_where_it_does_not():
    x, w1 = torch.empty(1, 1), torch.empty(4096, 2**19, 1, device="meta")
    assert backend.refuses_mlp(x, w1) == f"{FAR} rows of weights; below {FAR}"
    assert backend.refuses_mlp(x, w1.transpose(1, 2)) == f"{FAR} rows of weights; below {FAR}"
    assert backend.refuses_mlp(x, w1[:, 1:]) is None
    table = torch.empty(2, 2**23, 64, 2, device="meta")
    assert backend.refuses_rope(x, x, x, x, None, table) == f"rope_table of {FAR} numbers; below {FAR}"
    assert backend.refuses_rope(x, x, x, x, None, table[:, 1:]) is None


HEADS = pytest.mark.parametrize(
    "rows, width, vocab",
    [(2**28 + END, 16, 1024 + END), (END, 128, 2**24 + END), (2**20 + END, 16, 2**18 + END)],
    ids=["rows", "words", "panels"],
)
"""rows: x, its gradient, that of the logits and its column sums are far. words: the weight. panels: their masses.

Without many rows, the last panel alone is computed: 8 words. Others have no mass, as if they were not there."""


def head_inputs(rows, width, vocab):
    """(x, weight, bias, words that are computed), nothing but zeros before the last rows and words."""
    normal, words = numbers(), vocab if vocab < 2**18 else END
    x, bias = with_end(normal(END, width), rows, width), normal(words) + 8.0
    return x, with_end(normal(words, width, scale=0.3), vocab, width), with_end(bias, vocab), words


def last_tiles(rows, vocab, words):
    """The programs of the last rows, of one panel or of all: panel after panel, tile of 128 rows after tile."""
    tiles = -(-rows // 128)
    return (slice(tiles - 1, None, tiles) if words == vocab else LAST,)


@HEADS
def test_linear_cross_entropy(run_part, rows, width, vocab):
    g = torch.Generator().manual_seed(1)
    x, weight, bias, words = head_inputs(rows, width, vocab)
    target, current = (torch.randint(words, (END,), generator=g) for _ in range(2))
    rate, dloss = torch.rand(END, generator=g), torch.randn(END, generator=g)
    names = [with_end(end, rows) for end in (target + vocab - words, current + vocab - words, rate)]
    last = last_tiles(rows, vocab, words)
    got = run_part(
        linear_cross_entropy.forward, x, weight, bias, *names, "gkl", head_masses=last, others=slice(-2, None)
    )
    ends = (x[-END:], weight[-words:], bias[-words:], target, current, rate, "gkl")
    want = cross_entropy_truth.forward(*ends)
    for a, b in zip(got, want, strict=True):
        close(a[-END:], b)
    if vocab // linear_cross_entropy.step_words(rows, vocab) < 10:
        args = (with_end(dloss, rows), *got[1:], x, weight, bias, *names, "gkl")
        chosen = {
            "linear_cross_entropy_bwd_logits": last,
            "linear_cross_entropy_bwd_words": (ALL if words == vocab else LAST,),
        }
        grads = run_part(linear_cross_entropy.backward, *args, **chosen)
        for a, b in zip(grads, cross_entropy_truth.backward(dloss, *want[1:], *ends), strict=True):
            close(a[-len(b) :], b)


@HEADS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_linear_sample(run_part, rows, width, vocab, temperature):
    x, weight, bias, words = head_inputs(rows, width, vocab)
    names = [with_end(torch.arange(END) + i, rows) for i in range(3)]
    last = slice(-END, None)
    chosen = {"head_masses": last_tiles(rows, vocab, words), "linear_sample_pick": (last,)}
    ids = run_part(linear_sample.forward, x, weight, bias, *names, temperature, **chosen)[-END:]
    if temperature == 0 or words == vocab:
        want = sample_truth.forward(x[-END:], weight[-words:], bias[-words:], *(n[-END:] for n in names), temperature)
        assert torch.equal(ids, want + vocab - words)
    assert (ids >= vocab - words).all() and (ids < vocab).all()


LATENTS, FIRST = FAR + 4096, FAR - 2048  # the last sample begins before element 2^31
LAST_BLOCKS = slice(-1 - 6144 // 1024, None)  # those of its latents, and that of the tokens


def flow_inputs(dtype, count):
    normal = numbers()
    ends = [normal(LATENTS - FIRST).to(dtype) for _ in range(count)]
    spans = torch.tensor([[0, 7], [FIRST, LATENTS - FIRST]], dtype=torch.int32)
    own = torch.tensor([[0, 0], [0, LATENTS - FIRST]], dtype=torch.int32)
    tokens = torch.arange(8), torch.tensor([[0, 5], [5, 3]], dtype=torch.int32)
    return [with_end(end, LATENTS) for end in ends], ends, spans, own, *tokens


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_flow_noise(run_part, dtype):
    (data,), (end,), spans, own, tokens, token_spans = flow_inputs(dtype, 1)
    samples = torch.tensor([0.3, 0.6]), torch.tensor([0.4, 0.5]), torch.tensor([3, 4]), 7
    got = run_part(flow_noise.forward, data, tokens, *samples, spans, token_spans, 100, flow_noise=(LAST_BLOCKS,))
    want = noise_truth.forward(end, tokens, *samples, own, token_spans, 100)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[-len(b) :], b)


def test_flow_step(run_part):
    (x, *others), (end, *ends), spans, own, tokens, token_spans = flow_inputs(FP32, 6)
    coefs = torch.rand(2, 10, generator=torch.Generator().manual_seed(2))
    token_args = (
        tokens,
        tokens + 100,
        torch.tensor([0.4, 0.5]),
        torch.tensor([3, 4]),
        torch.tensor([7, 8]),
        token_spans,
    )

    def args(x, v_cond, v_uncond, last, m1, m2, spans):
        return x, v_cond, v_uncond, torch.tensor([2.0, 5.0]), coefs, last, m1, m2, spans, *token_args

    got = run_part(flow_step.forward, *args(x, *others, spans), flow_step=(LAST_BLOCKS,))
    want = step_truth.forward(*args(end, *ends, own))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[-len(b) :], b)


def may_be_far(name, shape):
    """Whether an argument may have more elements than an int32 counts: latents, and what has two letters, unless it is
    a table of samples or spans, one number for each choice of a row, or refused (weights of experts, rope_table)."""
    if len(shape) < 2 or shape[0] in ("S", "B"):
        return shape == ["N"]
    return name not in ("p_weights", "p_dweights", "p_experts", "p_table") and shape != ["E", "N"]


def test_every_kernel_has_met_every_far_tensor(request):
    """Each argument of each kernel that may be far was so in a launch of the tests before this one."""
    files = [KERNELS.parent / "tests/ops" / f"test_triton_addresses{end}.py" for end in ("", "_products")]
    wanted = {name for file in files for name in re.findall(r"^def (test_\w+)\(run_part", file.read_text(), re.M)}
    if absent := wanted - {item.originalname for item in request.session.items}:
        pytest.skip(f"not all tests of addresses run here: {sorted(absent)}")
    missing, seen = [], 0
    for path in sorted(KERNELS.glob("*.py")):
        for kernel, arguments in re.findall(r"^def (\w+_kernel)\((.*?)^\):", path.read_text(), re.M | re.S):
            for name, shape in re.findall(r"^    ([px]_\w+),  # \[([^\]]+)\]", arguments, re.M):
                if may_be_far(name, shape.split(", ")):
                    seen += 1
                    missing += [f"{kernel}: {name}"] * (name not in far_arguments[kernel])
    assert seen > 100 and missing == []
