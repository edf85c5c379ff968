"""Autocast changes no op: what a call gives hangs on the dtypes of its arguments, on every backend the same way. Triton
and CUDA: test_triton_modes.py."""

import pytest
import torch
from harness import BF16, EVERYWHERE, FP16, FP32, as_tuple, run
from test_on_gpu import SUITES

from uvg_engine import backends
from uvg_engine.backends import plans
from uvg_engine.ops import _registry

ON_CPU = sorted(EVERYWHERE - {"triton", "cuda"})
SERVERS = [(op, name) for op in sorted(SUITES) for name in ON_CPU if op in backends.table(name)]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_unchanged(function, case, dtype, cast):
    """Forward and backward inside, with a gradient and without."""
    inputs = case.inputs(dtype)
    outputs, grads, douts = run(function, case, inputs)
    with torch.autocast("cpu", dtype=cast):
        x = torch.ones(2, 2)
        assert torch.nn.functional.linear(x, x).dtype == cast
        got, got_grads, _ = run(function, case, inputs, douts)
        assert_same((*got, *got_grads.values()), (*outputs, *grads.values()))
        with torch.no_grad():
            assert_same(as_tuple(function(**inputs)), outputs)


@pytest.mark.parametrize("way", ["plain", "dispatched"])
@pytest.mark.parametrize("op, name", SERVERS)
def test_autocast_changes_no_bit(op, name, way, monkeypatch):
    """dispatched: as torch's op, which is what compiled code calls."""
    if way == "dispatched":
        monkeypatch.setattr(_registry, "alone", lambda args: False)
    suite = SUITES[op]()
    with backends.force(name), plans.kept(False):
        for case in suite.cases:
            for dtype in [each for each in (FP32, BF16) if each in case.dtypes] or case.dtypes:
                assert_unchanged(suite.function, case, dtype, FP16 if dtype == BF16 else BF16)
