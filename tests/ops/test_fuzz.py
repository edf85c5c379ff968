"""Every op on every backend with shapes, spans and strides that nobody chose: values by the 2x rule on poisoned memory,
beside neighbours the bits of alone (of the core's kernels the gradients of rows too), and where the kernel is ours the
same bits with one thread and with two (MKL's fp32 products, on which the reference runs, may change with the threads).
The examples are the same in every run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import gpu_device
import pytest
import test_flash_attention
import test_flash_attention_int8
import test_flow_noise
import test_flow_step
import test_gated_residual
import test_gated_residual_norm
import test_linear
import test_linear_cross_entropy
import test_linear_int8
import test_linear_sample
import test_modulated_layer_norm
import test_moe_combine
import test_moe_dispatch
import test_moe_mlp
import test_moe_mlp_int8
import test_moe_route
import test_qk_norm_rope
import test_window_attention
import torch
from harness import BF16, FP32, as_tuple, backends_of, poisoned, run, spans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from uvg_engine import backends

EXAMPLES = {"cuda": 1, "triton": 1, "triton@gpu": 2}  # simulated and interpreted; each shape is compiled
OTHERS = 8
# A result may have three values, the largest error of the reference then be a lucky one: sums over 65 rows and 1,030
# words erred by 4.9 and 8.5 ulps where its own erred by 0.8 and 1.5.
LUCK = 8
LIBRARIES = ("reference", "sdpa")  # torch's kernels
SIZE = st.sampled_from((1, 2, 3, 5, 8, 15, 17, 31, 33, 64, 65, 97))
LENGTHS = st.lists(st.sampled_from((0, 1, 2, 3, 7, 16, 33, 65)), min_size=1, max_size=5)


@st.composite
def attention(draw):
    lengths = [(draw(SIZE), draw(st.sampled_from((0, 1, 4, 31)))) for _ in range(draw(st.integers(1, 3)))]
    starts, rows = [], 0
    for pair in zip(*lengths):  # modality-major, as in a batch
        starts.append([rows + sum(pair[:i]) for i in range(len(pair))])
        rows += sum(pair)
    own = [tuple((starts[m][b], n) for m, n in enumerate(sample)) for b, sample in enumerate(lengths)]
    heads, width = draw(st.integers(1, 3)), draw(SIZE)
    table = test_flash_attention.table(*own)
    return lambda g: test_flash_attention.attention(g, rows, rows, table, table, heads, width)


@st.composite
def rope(draw):
    rows, spans = 0, []
    for _ in range(draw(st.integers(1, 4))):
        grid = [draw(st.integers(1, 4)) for _ in range(3)]
        length = draw(st.integers(0, 16))
        video = draw(st.booleans())
        spans.append((rows, grid[0] * grid[1] * grid[2], 0, *grid) if video else (rows, length, 1, 0, 0, 0))
        rows += spans[-1][1]
    heads, pairs = draw(st.integers(1, 3)), draw(SIZE)
    absent = (test_qk_norm_rope.K, test_qk_norm_rope.ROTATION)
    without = [name for names in absent if draw(st.integers(0, 3)) == 3 for name in names]
    return lambda g: test_qk_norm_rope.made(g, rows, spans, heads, 2 * pairs) | dict.fromkeys(without)


@st.composite
def flow(draw, make):
    latents = draw(LENGTHS)
    texts = [draw(st.integers(0, 9)) for _ in latents]
    gap = draw(st.integers(0, 2))
    return lambda g: make(g, latents, texts, gap=gap)


@st.composite
def experts(draw):
    bounds = [0]
    for length in draw(LENGTHS):
        bounds.append(bounds[-1] + length)
    width, hidden = draw(SIZE), draw(SIZE)
    return lambda g: test_moe_mlp.experts(g, tuple(bounds), width, hidden)


@st.composite
def routed(draw, module):
    """Cases of the routing ops; the makers there give whole cases."""
    rows, experts = draw(SIZE), draw(SIZE)
    top_k = draw(st.integers(1, min(experts, 8)))
    if module is test_moe_combine:
        return module.case("", rows, draw(SIZE), top_k).make
    if module is test_moe_dispatch:
        return module.case("", rows, draw(SIZE), experts, top_k).make
    return module.case("", rows, experts, top_k).make


def tiled(lengths):
    """Span table of runs that lie one after the other."""
    return spans(*((sum(lengths[:i]), n) for i, n in enumerate(lengths)))


@st.composite
def layer(draw):
    # a library sums few rows' long products in many parts, which errs less than the 2x rule can ask of others
    lengths, depth, width = draw(LENGTHS), draw(SIZE.filter(lambda depth: depth < 64)), draw(SIZE)
    activation = draw(st.sampled_from(("none", "gelu_tanh")))
    more = {"activation": activation, "row_spans": tiled(lengths)}
    return lambda g: test_linear.layer(g, sum(lengths), depth, width, **more)


@st.composite
def residual_norm(draw):
    sets = (("gate", "shift", "scale"), ("gate", "weight", "bias"), ("shift", "scale"), ("gate",))
    lengths, width, parts = draw(LENGTHS), draw(SIZE.filter(lambda width: width > 2)), draw(st.sampled_from(sets))
    return lambda g: test_gated_residual_norm.fused(g, lengths, width, parts)


@st.composite
def window(draw):
    near = st.tuples(*[st.integers(1, 4)] * 3)
    grids, texts = (
        draw(st.lists(near, min_size=1, max_size=3)),
        draw(st.lists(st.integers(0, 9), min_size=3, max_size=3)),
    )
    sizes = [f * y * x for f, y, x in grids]
    video = [(sum(sizes[:i]), *grid) for i, grid in enumerate(grids)]
    text = [(sum(sizes) + sum(texts[:i]), texts[i]) for i in range(len(grids))]
    rows = sum(sizes) + sum(texts[: len(grids)])
    numbers = {"tile": draw(near), "radius": tuple(n - 1 for n in draw(near))}
    heads, width = draw(st.integers(1, 3)), draw(SIZE)
    return lambda g: test_window_attention.attention(g, rows, heads, width, video, text, **numbers)


def shaped(make, *sizes):
    """A maker called with sizes drawn from these strategies."""
    return st.tuples(*sizes).map(lambda drawn: lambda g: make(g, *drawn))


OPS = {
    "flash_attention": (test_flash_attention, attention()),
    "flash_attention_int8": (test_flash_attention_int8, attention()),
    "flow_noise": (test_flow_noise, flow(test_flow_noise.corruption)),
    "flow_step": (test_flow_step, flow(test_flow_step.step)),
    "gated_residual": (test_gated_residual, shaped(test_gated_residual.gated, LENGTHS, SIZE)),
    "gated_residual_norm": (test_gated_residual_norm, residual_norm()),
    "linear": (test_linear, layer()),
    "linear_cross_entropy": (
        test_linear_cross_entropy,
        st.sampled_from((test_linear_cross_entropy.head, test_linear_cross_entropy.gkl)).flatmap(
            lambda make: shaped(make, SIZE, SIZE, st.sampled_from((1, 7, 129, 1030)))
        ),
    ),
    "linear_int8": (test_linear_int8, shaped(test_linear.layer, SIZE, SIZE, SIZE)),
    "linear_sample": (
        test_linear_sample,
        shaped(test_linear_sample.head, SIZE, SIZE, st.sampled_from((1, 7, 1024, 2050))),
    ),
    "modulated_layer_norm": (
        test_modulated_layer_norm,
        shaped(test_modulated_layer_norm.modulated, LENGTHS, SIZE.filter(lambda width: width > 2)),
    ),
    "moe_combine": (test_moe_combine, routed(test_moe_combine)),
    "moe_dispatch": (test_moe_dispatch, routed(test_moe_dispatch)),
    "moe_mlp": (test_moe_mlp, experts()),
    "moe_mlp_int8": (test_moe_mlp_int8, experts()),
    "moe_route": (test_moe_route, routed(test_moe_route)),
    "qk_norm_rope": (test_qk_norm_rope, rope()),
    "window_attention": (test_window_attention, window()),
}
# What a batch behind this one repeats: arguments with an entry per row or sample, and spans with what they point into.
# The other ops sum over all rows, or give them to a library's matrix product.
REPEATED = {
    "flash_attention": (("q", "k", "v"), {"q_spans": "q", "k_spans": "k"}),
    "flash_attention_int8": (("q", "k", "v"), {"q_spans": "q", "k_spans": "k"}),
    "flow_noise": (
        ("data", "tokens", "sigma", "kappa", "seeds"),
        {"latent_spans": "data", "token_spans": "tokens"},
    ),
    "flow_step": (
        (*test_flow_step.LATENTS, *test_flow_step.TOKENS, *test_flow_step.PER_SAMPLE),
        {"latent_spans": "x", "token_spans": "tokens"},
    ),
    "gated_residual": (("h", "y", "gate"), {"spans": "h"}),
    "gated_residual_norm": (("h", "y", "gate", "shift", "scale"), {"spans": "h", "norm_spans": "h"}),
    "linear": (("x",), {"row_spans": "x"}),
    "linear_int8": (("x",), {}),
    "linear_sample": (("x", *test_linear_sample.NAMES), {}),
    "modulated_layer_norm": (("x", "shift", "scale"), {"spans": "x"}),
    "moe_route": (("logits",), {}),
    "qk_norm_rope": (("q", "k"), {"rope_spans": "q"}),
    "window_attention": (("q", "k", "v"), {"video_spans": "q", "text_spans": "q"}),
}
REPEATED_ON_CPU = REPEATED | {"linear_cross_entropy": (("x", "target", "current", "rate"), {})}
RUNS = [gpu_device.marked(op, name) for op in sorted(OPS) for name in backends_of(op) + gpu_device.names(op)]


def suite_of(op):
    """The op's own suite: what its cases and its tolerances are."""
    return next(v for v in vars(OPS[op][0]).values() if isinstance(v, type) and getattr(v, "op", None) == op)()


def twice(op, inputs):
    """The batch, and the same batch behind it."""
    names, spans = REPEATED_ON_CPU[op]
    both = {n: torch.cat([inputs[n]] * 2) for n in names if inputs.get(n) is not None}
    tables: dict[int, Tensor] = {}  # one table that serves twice stays one
    for name, rows in spans.items():
        table = inputs.get(name)
        if table is not None and id(table) not in tables:
            moved = table.clone()
            moved[..., 0] += len(inputs[rows])
            tables[id(table)] = torch.cat([table, moved])
        if table is not None:
            both[name] = tables[id(table)]
    return inputs | both


def packed_of(inputs):
    return {name: v.contiguous() if isinstance(v, Tensor) else v for name, v in inputs.items()}


def check_gradients_beside_neighbours(suite, case, inputs, douts):
    """The gradient of whatever has an entry per row or sample is that of the batch alone, twice."""
    _, alone, _ = run(suite.function, case, inputs, douts)
    _, both, _ = run(suite.function, case, twice(suite.op, inputs), [torch.cat([d, d]) for d in douts])
    for name in alone.keys() & set(REPEATED_ON_CPU[suite.op][0]):
        assert_same_bits(both[name].chunk(2) if len(both[name]) else (both[name],) * 2, (alone[name],) * 2)


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {place} differs"


def check(op: str, backend: str, make: Callable[..., Any], dtype: torch.dtype, strided: bool) -> None:
    suite = suite_of(op)
    suite.further = LUCK
    case = dataclasses.replace(suite.cases[0], name="fuzzed", make=make, ulps=max(1024, suite.cases[0].ulps))
    inputs = case.inputs(dtype, strided)
    with poisoned():
        outputs, grads, douts = suite.assert_right(case, inputs, dtype, backend)
        if backend not in LIBRARIES:
            threads = torch.get_num_threads()
            torch.set_num_threads(1 if threads > 1 else 2)
            try:
                more, more_grads, _ = run(suite.function, case, inputs, douts)
            finally:
                torch.set_num_threads(threads)
            assert_same_bits((*more, *more_grads.values()), (*outputs, *grads.values()))
        if op in REPEATED:
            packed = packed_of(inputs)
            both, alone = (as_tuple(suite.function(**given)) for given in (twice(op, packed), packed))
            for one, two in zip(alone, both, strict=True):
                if len(two) == 2 * len(one):
                    assert_same_bits((two[: len(one)], two[len(one) :]), (one, one))
        if op in REPEATED_ON_CPU and backend == "cpu" and grads:
            check_gradients_beside_neighbours(suite, case, packed_of(inputs), douts)


@pytest.mark.parametrize(("op", "on"), RUNS)
def test_fuzzed(op, on):
    examples = EXAMPLES.get(on, OTHERS)
    refusals = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(OPS[op][1], st.sampled_from((FP32, BF16)), st.booleans())
    def fuzzed(make, dtype, strided):
        with gpu_device.forced(on) as backend:
            try:
                check(op, backend, make, dtype, strided)
            except backends.BackendRefused as refusal:
                refusals.append(str(refusal))

    fuzzed()
    if len(refusals) >= examples:
        pytest.skip(refusals[0])


def test_every_op_is_fuzzed():
    assert set(backends.table("reference")) == set(OPS)
