"""Every op's own cases on a CUDA device, on each backend that serves them: the 2x rule against fp64 on the CPU."""

import importlib
from pathlib import Path

import pytest
import torch
from harness import OpSuite, assert_2x, run

from uvg_engine import backends

DEVICE = "cuda"


def suites():
    """The OpSuite classes of the files beside this one."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.stem != Path(__file__).stem:
            values = vars(importlib.import_module(path.stem)).values()
            found |= {v.op: v for v in values if isinstance(v, type) and issubclass(v, OpSuite) and hasattr(v, "op")}
    return found


SUITES = suites()
RUNS = [(op, case, dtype) for op, suite in SUITES.items() for case in suite.cases for dtype in case.dtypes]


def moved(inputs, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op, case, dtype", RUNS, ids=[f"{op}-{c.name}-{str(d)[6:]}" for op, c, d in RUNS])
def test_values(op, case, dtype):
    suite = SUITES[op]()
    inputs = case.inputs(dtype)
    exact = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}
    with backends.force("reference"):
        same_outputs, same_grads, douts = run(suite.function, case, inputs)
        true_outputs, true_grads, _ = run(suite.function, case, exact, douts)
    served = []
    for name in backends.ORDER:
        if op not in backends.table(name):
            continue
        try:
            with backends.force(name):
                outputs, grads, _ = run_on(suite, case, inputs, douts)
        except backends.BackendRefused:
            continue
        served.append(name)
        for i, triple in enumerate(zip(outputs, same_outputs, true_outputs, strict=True)):
            assert_2x(f"{name}: output {i}", case.ulps, *triple, further=suite.allowed.get((name, dtype, i), 0))
        for leaf, grad in grads.items():
            assert_2x(f"{name}: gradient of {leaf}", case.ulps, grad.contiguous(), same_grads[leaf], true_grads[leaf])
    assert "reference" in served


def run_on(suite, case, inputs, douts):
    """`harness.run` on the device, results back on the CPU; the cotangents are the same ones, in their own dtypes."""
    outputs, grads, _ = run(suite.function, case, moved(inputs, DEVICE), [d.to(DEVICE) for d in douts])
    return tuple(o.cpu() for o in outputs), {n: g.cpu() for n, g in grads.items()}, douts
