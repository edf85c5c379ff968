"""Every op's own cases with plans of calls (`uvg_engine.backends.plans`) and without: the same bits."""

import pytest
import torch
from harness import FP32, as_tuple, poisoned, run
from test_on_gpu import SUITES

from uvg_engine import backends
from uvg_engine.backends import native, plans
from uvg_engine.ops import _plans, _registry

pytestmark = pytest.mark.skipif(not _plans._begin(), reason="no native core, or a torch without DLPack's functions")
OPS = sorted(op for op in SUITES if native.cpu() is None or op in backends.table("cpu"))
CASES = [(op, case, dtype) for op in OPS for case in SUITES[op].cases for dtype in case.dtypes]


def same(got, want):
    return all(
        a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape and _plans._same(a, b)
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("op, case, dtype", CASES, ids=[f"{o}-{c.name}-{str(d)[6:]}" for o, c, d in CASES])
@pytest.mark.parametrize("strided", [False, True])
def test_a_plan_changes_no_bit(op, case, dtype, strided):
    function = SUITES[op]().function
    given = [case.inputs(dtype, strided) for _ in range(4)]  # at other addresses each
    for name, value in case.leaves(given[-1]).items():
        given[-1][name] = (value * 0.5).to(dtype=value.dtype) if not strided else value  # and with other values at last
    for inputs in given:
        with plans.kept(False):
            outputs, grads, _ = run(function, case, inputs)
        with poisoned():
            planned, planned_grads, _ = run(function, case, inputs)
        assert same(planned, outputs) and same(planned_grads.values(), grads.values())
        with torch.no_grad():
            with plans.kept(False):
                want = as_tuple(function(**inputs))
            with poisoned():
                assert same(as_tuple(function(**inputs)), want)


@pytest.mark.parametrize("op", [op for op in OPS if op in _registry._applies])
def test_the_third_call_with_a_gradient_is_past_the_rules(op, monkeypatch):
    function, case = SUITES[op]().function, SUITES[op].cases[0]
    for planner in _plans.planners.values():
        native.core().plans_forget(planner)
    inputs = case.inputs(FP32)
    for _ in range(3):
        outputs, grads, _ = run(function, case, inputs)
    monkeypatch.setattr(_registry, "alone", None)  # who takes the long way calls it
    again, grads_again, _ = run(function, case, inputs)
    assert same(again, outputs) and same(grads_again.values(), grads.values())


@pytest.mark.parametrize("op", OPS)
def test_the_third_call_is_by_a_plan(op, monkeypatch):
    suite = SUITES[op]()
    given = [suite.cases[0].inputs(FP32) for _ in range(3)]
    weights = {name: given[0][name] for name in ("weight", "w1", "w2") if name in given[0]}  # are kept packed
    for planner in _plans.planners.values():
        native.core().plans_forget(planner)  # those of other tests, for which a full table may wait
    with torch.no_grad():
        for inputs in given[:2]:
            suite.function(**(inputs | weights))
        monkeypatch.setattr(backends, "select", None)  # who takes the long way calls it
        suite.function(**(given[2] | weights))
