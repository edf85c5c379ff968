"""The CUDA kernels in the simulator: the same bits in every order of threads, and what their accesses cost."""

from __future__ import annotations

import functools
import re

import cuda_simulator
import pytest
import torch
from harness import BF16, FP32, normal, spans

from bench import cuda_launches
from uvg_engine import backends, ops
from uvg_engine.backends import native
from uvg_engine.cli import _op_calls

ORDERS = ("reverse", "7", "8")

needs_simulator = pytest.mark.skipif(cuda_simulator.module() is None, reason="the simulator was not built")


@pytest.mark.skipif(native.cpu() is None or not cuda_simulator.BUILD.is_dir(), reason="no native build here")
def test_the_simulator_was_built():
    assert cuda_simulator.module() is not None, "cmake -DUVG_TESTS=ON builds it; without it no CUDA kernel is tested"


def rows(width, dtype):
    """Inputs of the row ops: two spans of video and text."""
    g = torch.Generator().manual_seed(0)
    x, y, dx = (normal(g, 12, width).to(dtype) for _ in range(3))
    per_span = [normal(g, 2, width).float() for _ in range(3)]
    return x, y, dx, per_span, spans((0, 8), (8, 4))


def norm(width, dtype=BF16):
    x, _, dy, (shift, scale, _), table = rows(width, dtype)
    leaves = [v.requires_grad_() for v in (x, shift, scale)]
    return ops.modulated_layer_norm(x, shift, scale, table), leaves, dy


def residual(width, dtype=BF16):
    h, y, dout, (gate, *_), table = rows(width, dtype)
    return ops.gated_residual(h, y.requires_grad_(), gate.requires_grad_(), table), [y, gate], dout


def residual_norm(width, dtype=BF16):
    h, y, dout, (gate, shift, scale), table = rows(width, dtype)
    leaves = [v.requires_grad_() for v in (h, y, gate, shift, scale)]
    out, normed = ops.gated_residual_norm(h, y, gate, table, shift, scale, table)
    return out + normed, leaves, dout


def rope(width, dtype=BF16):
    q, k, dq, *_ = rows(width, dtype)
    weights = [torch.ones(width, requires_grad=True) for _ in range(2)]
    table = torch.rand(2, 8, width // 8, 2, generator=torch.Generator().manual_seed(1))
    kinds = torch.tensor([[0, 8, 0, 2, 2, 2], [8, 4, 1, 0, 0, 0]], dtype=torch.int32)
    leaves = [q.requires_grad_(), k.requires_grad_(), *weights]
    return sum(ops.qk_norm_rope(q, k, *weights, kinds, table, 4)), leaves, dq


def attention(width, dtype=BF16):
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (normal(g, 140, 1, width).to(dtype) for _ in range(4))
    table = torch.tensor([[[0, 50], [130, 10]], [[50, 80], [0, 0]]], dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return ops.flash_attention(*leaves, table, table)[0], leaves, dout


CALLS = {
    "modulated_layer_norm": norm,
    "gated_residual": residual,
    "gated_residual_norm": residual_norm,
    "qk_norm_rope": rope,
    "flash_attention": attention,
}


def results(call, width, dtype=BF16):
    with cuda_simulator.running(), backends.force("cuda"):
        out, leaves, dout = call(width, dtype)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)


@needs_simulator
@pytest.mark.parametrize("op", CALLS)
def test_the_same_bits_in_every_order_of_threads(op):
    simulator = cuda_simulator.module()
    want = results(CALLS[op], 64)
    try:
        for order in ORDERS:
            simulator.set_order(order)
            assert all(torch.equal(a, b) for a, b in zip(results(CALLS[op], 64), want, strict=True)), order
    finally:
        simulator.set_order("forward")


def run_counted(op, width, dtype=BF16):
    """(counters, launches as (grid, threads, bytes of shared memory)) of forward and backward."""
    simulator = cuda_simulator.module()
    simulator.reset_counters()
    results(CALLS[op], width, dtype)
    return simulator.counters(), simulator.launches()


counted = functools.cache(run_counted)


@needs_simulator
@pytest.mark.parametrize("op", CALLS)
def test_shared_memory_has_no_bank_conflicts(op):
    for width in (64, 128):
        count, _ = counted(op, width)
        assert count["shared_wavefronts"] == count["shared_wavefronts_ideal"] > 0 or op == "gated_residual"


@needs_simulator
@pytest.mark.parametrize("op", ["modulated_layer_norm", "gated_residual"])
def test_rows_travel_in_whole_sectors_of_16_byte_accesses(op):
    """In fp32: beside bf16 rows a lane takes a parameter's 32 bytes in two accesses, each over all sectors."""
    count, _ = counted(op, 256, FP32)
    wide = sum(v for name, v in count.items() if name in ("global_load_bytes_16", "global_store_bytes_16"))
    moved = sum(v for name, v in count.items() if name.startswith("global_") and "_bytes_" in name)
    assert count["global_sectors"] == count["global_sectors_ideal"]
    assert wide > 0.8 * moved, count  # the rest: statistics, and few rows per sum over them


@needs_simulator
def test_attention_does_the_products_that_its_tiles_have_and_no_more():
    """Two samples of 60 and 80 rows: 3 tiles of 64 queries against 1 or 2 of 64 keys; the backward's tiles likewise."""
    simulator = cuda_simulator.module()
    with cuda_simulator.running(), backends.force("cuda"), torch.no_grad():
        simulator.reset_counters()
        attention(128)
    assert simulator.counters()["matrix_flops"] == (1 + 2 * 2) * 4 * 64 * 64 * 128


SUMS = "column_partials_kernel<{}Terms<BFloat16, 8>, 8>"
LAUNCHES = {  # of forward and backward in bf16, heads of 128
    "modulated_layer_norm": ("forward", "backward", SUMS.format("Modulation"), "column_totals_kernel<2>"),
    "gated_residual": ("forward", "backward", SUMS.format("Gate"), "column_totals_kernel<1>"),
    "gated_residual_norm": (
        *("forward", "backward", SUMS.format("Gate"), "column_totals_kernel<1>"),
        *(SUMS.format("Modulation"), "column_totals_kernel<2>"),
    ),
    "qk_norm_rope": ("forward", "backward", *[SUMS.format("Weight"), "column_totals_kernel<1>"] * 2),
    "flash_attention": (
        "flash_attention: forward_kernel<BFloat16, 128>",
        *(f"flash_attention_backward: {name}_kernel<BFloat16, 128>" for name in ("delta", "dq", "dkv")),
    ),
}


@needs_simulator
@pytest.mark.parametrize("op", CALLS)
def test_launches_are_those_of_the_static_report(op):
    """What bench/cuda_launches.py says of threads and shared memory, from which occupancy is counted."""
    _, launches = counted(op, 128)
    told = [name if "kernel" in name else f"{op}: {name}_kernel<BFloat16, 8>" for name in LAUNCHES[op]]
    assert [launch[1:] for launch in launches] == [cuda_launches.launch_of(name, 128) for name in told]


FORWARDS = {
    "linear_sample": ("linear_sample: weigh_kernel<BFloat16>", "linear_sample: pick_kernel<BFloat16>"),
    "moe_route": ("moe_route: forward_kernel<BFloat16>",),
    "moe_dispatch": ("moe_dispatch: forward_kernel<BFloat16, 8>",),
    "moe_combine": ("moe_combine: forward_kernel<BFloat16, 8>",),
    "flow_noise": ("flow_noise: noise_kernel<BFloat16, 8>",),
    "flow_step": ("flow_step: step_kernel<BFloat16, 4>",),
}


@needs_simulator
@pytest.mark.parametrize("op", FORWARDS)
def test_forward_launches_are_those_of_the_static_report(op):
    """One launch for both streams of a flow op, among them."""
    simulator = cuda_simulator.module()
    simulator.reset_counters()
    with cuda_simulator.running(), backends.force("cuda"), torch.no_grad():
        _op_calls.CALLS[op](BF16)
    launched = [launch[1:] for launch in simulator.launches()]
    assert launched == [cuda_launches.launch_of(name) for name in FORWARDS[op]]


ROUTED, CHOICES, ROUTED_WIDTH = 40, 3, 64  # three blocks of rows


def routed(experts=2):
    """(results and gradients of one op after the other, calls as (op and pass, launches, counters)) in bf16."""
    simulator, calls = cuda_simulator.module(), []
    g = torch.Generator().manual_seed(0)
    x, dout = (normal(g, ROUTED, ROUTED_WIDTH).to(BF16) for _ in range(2))
    logits = normal(g, ROUTED, 4 + experts).float()

    def call(name, function, *args):
        simulator.reset_counters()
        made = function(*args)
        calls.append((name, simulator.launches(), simulator.counters()))
        return made

    with cuda_simulator.running(), backends.force("cuda"):
        leaves = [v.requires_grad_() for v in (x, logits)]
        weights, picked = call("moe_route: forward", ops.moe_route, logits, CHOICES)
        grouped, offsets, order = call("moe_dispatch: forward", ops.moe_dispatch, x, picked, 4 + experts)
        out = call("moe_combine: forward", ops.moe_combine, grouped, order, weights)
        grad = torch.autograd.grad
        dgrouped, dweights = call("moe_combine: backward", grad, out, (grouped, weights), dout)
        (dx,) = call("moe_dispatch: backward", grad, grouped, leaves[:1], dgrouped)
        (dlogits,) = call("moe_route: backward", grad, weights, leaves[1:], dweights)
    made = (weights, picked, grouped, offsets, order, out, dgrouped, dweights, dx, dlogits)
    return [each.detach() for each in made], calls


@needs_simulator
def test_routing_is_one_launch_an_op_and_pass():
    _, calls = routed()
    for name, launches, _ in calls:
        assert [launch[1:] for launch in launches] == [cuda_launches.launch_of(f"{name}_kernel<BFloat16, 8>")], name
        assert launches[0][0][0] > 2, "one block would need no order among blocks"


# Rows that an op reads and writes, of 40 with 3 choices each.
MOVED = {
    "moe_dispatch: forward": (ROUTED, ROUTED * CHOICES),
    "moe_dispatch: backward": (ROUTED * CHOICES, ROUTED),
    "moe_combine: forward": (ROUTED * CHOICES, ROUTED),
    "moe_combine: backward": (2 * ROUTED * CHOICES, ROUTED * CHOICES),
}


@needs_simulator
def test_routing_moves_each_row_once_in_16_byte_accesses():
    _, calls = routed()
    for name, _, count in calls:
        if name not in MOVED:
            continue
        moved = tuple(count[f"global_{kind}_bytes_16"] // (2 * ROUTED_WIDTH) for kind in ("load", "store"))
        assert moved == MOVED[name], name
        assert not count.get("global_load_bytes_2") and not count.get("global_store_bytes_2"), name


@needs_simulator
@pytest.mark.parametrize("experts", [2, 1100])
def test_routing_has_the_same_bits_in_every_order_of_blocks(experts):
    """With more experts than are counted at a time, too."""
    simulator, (want, _) = cuda_simulator.module(), routed(experts)
    try:
        for order in ORDERS:
            simulator.set_order(order)
            assert all(torch.equal(a, b) for a, b in zip(routed(experts)[0], want, strict=True)), order
    finally:
        simulator.set_order("forward")


@needs_simulator
def test_grids_depend_on_shapes_alone(monkeypatch):
    """The host knows no value of a span table: other spans, the same launches."""

    ops_with_spans = [op for op in CALLS if op != "qk_norm_rope"]  # whose spans must fit their grids
    before = [counted(op, 64)[1] for op in ops_with_spans]
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda rows, **how: tensor(rows, **how).sub_(1).clamp_(0))
    assert [run_counted(op, 64)[1] for op in ops_with_spans] == before


@needs_simulator
@pytest.mark.parametrize("order", ["", "back", "0", "-1"])
def test_an_order_is_forward_reverse_or_a_seed(order):
    with pytest.raises(ValueError, match=f"^order must be forward, reverse or a seed above 0, got '{order}'$"):
        cuda_simulator.module().set_order(order)


@needs_simulator
def test_a_field_that_no_kernel_has_is_an_error():
    with pytest.raises(ValueError, match=r"^no field is named 'gain'$"):
        cuda_simulator.module().gated_residual_forward(0, gain=1.0)


@needs_simulator
def test_a_fault_is_told_by_file_line_block_and_thread():
    simulator = cuda_simulator.module()
    buffers = {name: torch.zeros(3, 8) for name in ("h", "y", "out")}
    with pytest.raises(simulator.SimulationError) as fault:  # a row more than the buffers have
        given = {name: (x.data_ptr(), x.nbytes) for name, x in buffers.items()}
        simulator.gated_residual_forward(0, **given, rows=4, width=8)
    told = r"^csrc/cuda/gated_residual\.cu:\d+: block \(0,0,0\) thread \(96,0,0\): out of bounds: reads 16 bytes"
    assert re.match(told, str(fault.value)), fault.value


def on_cuda(function, *args, **kwargs):
    with cuda_simulator.running(), backends.force("cuda"):
        return function(*args, **kwargs)


@needs_simulator
def test_no_span_is_not_no_gate():
    """An empty tensor has no address either, and is not a missing one."""
    h, y, _, _, _ = rows(8, FP32)
    none, table = torch.empty(0, 8), spans()
    assert torch.equal(on_cuda(ops.gated_residual, h, y, none, table), h)
    out, normed = on_cuda(ops.gated_residual_norm, h, y, none, table, none, none, table)
    assert torch.equal(out, h) and torch.equal(normed, on_cuda(ops.modulated_layer_norm, h))
    assert torch.equal(on_cuda(ops.modulated_layer_norm, h, none, none, table), normed)


@needs_simulator
def test_views_that_begin_anywhere_are_read():
    """16 bytes at once, asynchronously, or two floats: of a weight inside a flat buffer, of a table at an odd place."""
    g = torch.Generator().manual_seed(0)
    x, weight = normal(g, 3, 64).to(BF16), normal(g, 70, 64).to(BF16)
    flat = torch.cat([torch.zeros(1, dtype=BF16), weight.flatten()])[1:].view(70, 64)
    ids = torch.arange(3)
    want = on_cuda(ops.linear_sample, x, weight, torch.zeros(70).to(BF16), ids, ids, ids)
    assert torch.equal(on_cuda(ops.linear_sample, x, flat, torch.zeros(70).to(BF16), ids, ids, ids), want)
    q, table = normal(g, 4, 16).float(), torch.rand(2, 4, 4, 2, generator=g)
    odd = torch.cat([torch.zeros(1), table.flatten()])[1:].view(table.shape)
    kinds, ones = torch.tensor([[0, 4, 1, 0, 0, 0]], dtype=torch.int32), torch.ones(16)
    want, _ = on_cuda(ops.qk_norm_rope, q, q, ones, ones, kinds, table, 2)
    assert torch.equal(on_cuda(ops.qk_norm_rope, q, q, ones, ones, kinds, odd, 2)[0], want)


def attention_grads(k_spans, change=lambda k, v: None):
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (normal(g, 9, 1, 16).to(BF16) for _ in range(4))
    change(k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = ops.flash_attention(*leaves, torch.tensor([[[0, 9]]], dtype=torch.int32), k_spans)
    return torch.autograd.grad(out, leaves, dout)


@needs_simulator
def test_a_key_that_a_sample_names_twice_counts_twice():
    twice = torch.tensor([[[0, 5], [3, 4]]], dtype=torch.int32)
    with backends.force("reference"):
        want = attention_grads(twice)
    for got, wanted in zip(on_cuda(attention_grads, twice), want, strict=True):
        torch.testing.assert_close(got.float(), wanted.float(), rtol=0.02, atol=0.02)


@needs_simulator
def test_keys_that_nobody_names_may_be_nan():
    def spoil(k, v):
        k[7:], v[7:] = torch.nan, torch.nan

    dq, dk, dv = on_cuda(attention_grads, torch.tensor([[[0, 7]]], dtype=torch.int32), spoil)
    assert dq.isfinite().all() and not dk[7:].any() and not dv[7:].any() and dk[:7].isfinite().all()


@needs_simulator
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("spoilt", ["q", "k", "v", "dout"])
def test_nan_of_another_sample_stays_there(spoilt, sample):
    """Its rows lie in the same tiles."""
    own, others = slice(9 * sample, 9 * sample + 9), slice(9 - 9 * sample, 18 - 9 * sample)
    g = torch.Generator().manual_seed(0)
    given = {name: normal(g, 18, 1, 16).to(BF16) for name in ("q", "k", "v", "dout")}
    table = torch.tensor([[[0, 9]], [[9, 9]]], dtype=torch.int32)

    def results():
        leaves = [given[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out, _ = ops.flash_attention(*leaves, table, table)
        return [x[own] for x in (out.detach(), *torch.autograd.grad(out, leaves, given["dout"]))]

    want = on_cuda(results)
    given[spoilt][others] = torch.nan
    for got, wanted in zip(on_cuda(results), want, strict=True):
        assert torch.equal(got, wanted)


@needs_simulator
def test_a_tile_of_keys_may_score_minus_infinity():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.ones(4, 1, 16), normal(g, 130, 1, 16), normal(g, 130, 1, 16)
    k[:64] = -torch.inf
    args = [x.to(BF16) for x in (q, k, v)]
    tables = [torch.tensor([[[0, rows]]], dtype=torch.int32) for rows in (4, 130)]
    out, lse = on_cuda(ops.flash_attention, *args, *tables)
    with backends.force("reference"):
        want, want_lse = ops.flash_attention(*args, *tables)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.002)
    torch.testing.assert_close(lse, want_lse)


@needs_simulator
def test_the_head_without_columns_draws_from_its_bias():
    ids = torch.arange(3)
    x, weight, bias = (torch.zeros(size, dtype=BF16) for size in ((3, 0), (5, 0), (5,)))
    bias[3] = 1.0
    assert on_cuda(ops.linear_sample, x, weight, bias, ids, ids, ids, temperature=0.0).tolist() == [3, 3, 3]


@needs_simulator
def test_minus_zero_ties_with_zero():
    logits = torch.tensor([[0.0, -0.0, -1.0], [-0.0, 0.0, -1.0], [-1.0, -0.0, 0.0]])
    assert on_cuda(ops.moe_route, logits, 1)[1].flatten().tolist() == [0, 0, 1]
