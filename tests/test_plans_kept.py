"""Which plans of calls there are: of this call and no other, as long as they do, and not too many of them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from test_plans import known, rows

from uvg_engine import ops
from uvg_engine.backends import native, packed_weights, plans
from uvg_engine.ops import _plans

pytestmark = pytest.mark.skipif(not _plans._begin(), reason="no native core, or a torch without DLPack's functions")


def test_a_plan_does_not_import_the_compiler():
    """150 MB and 2 s of the second call of a process."""
    lines = (
        "import sys, torch",
        "from uvg_engine import ops",
        "h = torch.ones(2, 3)",
        "assert all(torch.equal(ops.gated_residual(h, h), h + h) for _ in range(3))",
        "assert 'torch._dynamo' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def number_of(op):
    return native.core().plans_of(_plans.planners[op])


def test_another_tensor_over_the_same_memory_is_another_weight(long_ways):
    """Whose words were packed before the memory was written to where the mark does not look."""
    x, memory = rows(0, 5, 64), np.random.default_rng(0).standard_normal((64, 64), np.float32)
    first = torch.from_numpy(memory)
    for column in range(20, 28):
        known(ops.linear, x, first)
        memory[1, column] += 100
        again = torch.from_numpy(memory)
        torch.testing.assert_close(ops.linear(x, again), x @ again.T)
        packed_weights.forget(first)


def test_a_forgotten_weight_is_packed_anew_whoever_holds_its_words(long_ways):
    x, weight = rows(0, 5, 64), rows(1, 64, 64)
    for column in range(20, 28):
        known(ops.linear, x, weight)
        words = packed_weights.packed(weight, True)
        weight.numpy()[1, column] += 100
        packed_weights.forget(weight)
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)
        assert words.numel()


def test_what_changes_while_a_plan_is_made_spoils_none(long_ways, monkeypatch):
    """As another thread may do it: a setting, or an argument's shape."""
    make = _plans._plan

    def meanwhile(change):
        def plan(*args):
            made = make(*args)
            change()
            return made

        h, y = rows(0), rows(1)
        monkeypatch.setattr(_plans, "_plan", plan)
        known(ops.gated_residual, h, y)
        monkeypatch.setattr(_plans, "_plan", make)

    meanwhile(lambda: monkeypatch.setenv("UVG_BACKENDS", "reference"))
    del long_ways[:]
    ops.gated_residual(rows(0), rows(1))
    assert long_ways
    monkeypatch.delenv("UVG_BACKENDS")

    h, y = rows(2), rows(3)
    monkeypatch.setattr(_plans, "_plan", lambda *args: (make(*args), h.resize_(50, 8), y.resize_(50, 8))[0])
    known(ops.gated_residual, h, y)
    monkeypatch.setattr(_plans, "_plan", make)
    wide = rows(4, 50, 8)
    assert torch.equal(ops.gated_residual(wide, wide.clone()), 2 * wide)


def test_a_plan_is_made_under_one_setting(long_ways, monkeypatch):
    """UVG_BACKENDS is another one only while the call is noted, and before and after what it was."""
    make, args = _plans._plan, (rows(0), rows(1))

    def meanwhile(*given):
        monkeypatch.delenv("UVG_BACKENDS")
        made = make(*given)
        monkeypatch.setenv("UVG_BACKENDS", "reference")
        return made

    monkeypatch.setenv("UVG_BACKENDS", "reference")
    monkeypatch.setattr(_plans, "_plan", meanwhile)
    known(ops.gated_residual, *args)
    del long_ways[:]
    ops.gated_residual(*args)
    assert long_ways


def test_an_error_while_a_plan_is_made_is_not_the_callers(long_ways, monkeypatch):
    x, eps = rows(0), torch.tensor(1.0)
    want = ops.modulated_layer_norm(x, eps=1.0)
    assert all(torch.equal(ops.modulated_layer_norm(x, eps=eps), want) for _ in range(4))
    monkeypatch.setattr(_plans, "_plan", lambda *args: 1 / 0)
    assert all(torch.equal(ops.gated_residual(x, x), 2 * x) for _ in range(4))
    assert number_of(ops.gated_residual) == 0


def test_the_log_tells_once_why_there_is_no_plan(long_ways, monkeypatch, caplog):
    monkeypatch.setattr(_plans, "_told", set())
    caplog.set_level("DEBUG", logger="uvg_engine.ops._plans")
    wide, h, weight = rows(0, 5, 1 << 19), rows(1), rows(2, 8, 8).requires_grad_()
    for count in (3, 4, 5):
        known(ops.gated_residual, wide[:count], wide[:count])
        known(ops.linear, h[:count].T, rows(3, 4, count))
    want = ["gated_residual: arguments are large", "linear: torch's aten.clone.default ran"]
    assert caplog.messages == [f"no plan of a call of {each}" for each in want]

    caplog.clear()
    monkeypatch.setattr(_plans, "_plan", lambda *args: 1 / 0)
    for x in (h, h[:3]):
        for _ in range(3):
            ops.linear(x, weight).sum().backward()
    want = ["linear: ZeroDivisionError while it was made", "linear_bwd: ZeroDivisionError while it was made"]
    assert sorted(caplog.messages) == [f"no plan of a call of {each}" for each in want]
    assert all(record.exc_info for record in caplog.records)


def test_the_log_tells_of_other_threads(long_ways, monkeypatch, caplog):
    monkeypatch.setattr(_plans, "_told", set())
    caplog.set_level("DEBUG", logger="uvg_engine.ops._plans")
    make = _plans._plan
    monkeypatch.setattr(_plans, "_plan", lambda *args: (make(*args), monkeypatch.setenv("UVG_BACKENDS", "cpu"))[0])
    known(ops.gated_residual, rows(0), rows(1))
    assert caplog.messages == ["no plan of a call of gated_residual: another thread changed what it hangs on"]


def test_a_word_is_no_name(long_ways):
    x, weight, bias = rows(0), rows(1, 8, 8), rows(2)[0]
    known(ops.linear, x, weight, bias=bias)
    known(ops.linear, x, weight=weight)
    with pytest.raises((TypeError, ValueError)):
        ops.linear(x, weight, "bias", bias)
    with pytest.raises(AttributeError, match="'str' object has no attribute"):
        ops.linear(x, "weight", weight)


def test_weights_written_again_and_again_are_planned_when_that_ends(long_ways):
    x, weights = rows(0), [rows(i, 7, 8) for i in range(20)]
    for _ in range(10):
        for weight in weights:
            weight.mul_(1)
            known(ops.linear, x, weight)
    for _ in range(20):  # rounds in which some plans are made, and pay
        for weight in weights:
            known(ops.linear, x, weight)
    del long_ways[:]
    for weight in weights:
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)
    assert not long_ways


def test_a_weight_written_between_calls_is_seldom_planned(long_ways, monkeypatch):
    made, make = [], _plans._plan
    monkeypatch.setattr(_plans, "_plan", lambda *args: made.append(1) or make(*args))
    x, weight = rows(0), rows(1, 7, 8)
    for _ in range(200):
        weight.mul_(1)
        ops.linear(x, weight)
    assert 1 <= len(made) <= 10


def test_each_answer_has_a_plan(long_ways):
    def step(coefs):
        x, one, tokens = rows(0, 8), torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        spans = [torch.tensor([[0, count]], dtype=torch.int32) for count in (8, 1)]
        numbers = torch.ones(1), coefs[None], None, None, None
        return ops.flow_step(x, x, None, *numbers, spans[0], tokens, tokens, torch.zeros(1), one, one, spans[1])[0]

    few, more = torch.tensor([0, 1.0, 0, 0, 0, 0, 1, 0, 0, 0.5]), torch.tensor([0, 1.0, 0, 0, 0, 0, 1, 0.3, 0, 0.5])
    for _ in range(4):
        step(few), step(more)
    del long_ways[:]
    for coefs in (few, more, few):
        got = step(coefs)
        assert not long_ways
        with plans.kept(False):
            assert torch.equal(got, step(coefs))
        del long_ways[:]
    assert number_of(ops.flow_step) == 2


def test_two_shapes_in_turns_are_both_planned(long_ways):
    """Whatever their hashes have in common."""
    one = rows(0, 1, 8)
    for count in range(2, 1200):
        other = rows(0, count, 8)
        for _ in range(2):
            ops.gated_residual(one, one), ops.gated_residual(other, other)
        assert number_of(ops.gated_residual) == 2, count
        native.core().plans_forget(_plans.planners[ops.gated_residual])


def test_a_weight_of_inference_mode_leaves_others_their_plans(long_ways):
    x, weight = rows(0), rows(1, 7, 8)
    with torch.inference_mode():
        made = rows(1, 7, 8)
    for _ in range(4):
        ops.linear(x, made)
    known(ops.linear, x, weight)
    del long_ways[:]
    ops.linear(x, weight)
    assert not long_ways


def test_a_full_table_makes_room(long_ways):
    for count in range(1, 560):
        h = rows(0, count, 8)
        for _ in range(2):
            ops.gated_residual(h, h)
    h = rows(0, 7, 16)
    for _ in range(3000):
        ops.gated_residual(h, h)
    del long_ways[:]
    ops.gated_residual(h, h)
    assert not long_ways and number_of(ops.gated_residual) == 512


def test_a_planner_is_made_by_the_core_only():
    planner = _plans.planners[ops.gated_residual]
    with pytest.raises(TypeError, match="cannot create"):
        type(planner)()


def test_a_plan_gives_results_that_are_made():
    for results, one in (([-1], True), ([0], True), ([1], False), ([], True)):
        with pytest.raises(ValueError, match=r"no such result|one result is one"):
            native.core().plan([], [], [], [], [], results, one, 0, [])


def test_ids_have_the_width_of_a_kernel():
    ids = torch.zeros(4, dtype=torch.int16)
    with pytest.raises(ValueError, match="int32 or int64"):
        native.core().asks_inside(ids.data_ptr(), ids.element_size(), len(ids), 1)
