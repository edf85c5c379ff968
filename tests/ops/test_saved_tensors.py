"""Backwards whose saved tensors come back in other memory, as torch's saved_tensors_hooks may give them."""

import pytest
import torch
from harness import FP32, run
from test_on_gpu import SUITES

from uvg_engine import backends
from uvg_engine.backends import native
from uvg_engine.ops import _registry

OPS = sorted(set(SUITES) & set(_registry._applies))


def strided(x):
    """The same values, no two of them side by side."""
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]


@pytest.mark.parametrize("served_by", ["reference", "cpu"])
@pytest.mark.parametrize("op", OPS)
def test_strides_of_saved_tensors_change_no_gradient(op, served_by):
    if op not in backends.table(served_by):
        pytest.skip(f"{served_by} has no {op}")
    if served_by == "cpu" and native.cpu() is None:
        pytest.skip("no native core here")
    function = SUITES[op]().function
    for case in SUITES[op].cases:
        inputs = case.inputs(FP32)
        with backends.force(served_by):
            _, want, _ = run(function, case, inputs)
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), strided):
                _, got, _ = run(function, case, inputs)
        assert got
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, want[name], msg=lambda text, at=(case.name, name): f"{at}: {text}")
