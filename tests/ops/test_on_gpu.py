"""Every op's own cases on a CUDA device, on each backend that has the op: the 2x rule against fp64 on the CPU."""

import importlib
from pathlib import Path

import pytest
import torch
from harness import FP32, OpSuite, assert_2x, poisoned, run

from uvg_engine import backends

DEVICE = "cuda"
OWN = ("cuda", "triton")  # must serve the plainest case of every op that they have
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def suites():
    """The OpSuite classes of the files test_<op>.py beside this one."""
    files = [path.stem for path in Path(__file__).parent.glob("test_*.py")]
    modules = [importlib.import_module(f"test_{op}") for op in backends.table("reference") if f"test_{op}" in files]
    values = [value for module in modules for value in vars(module).values()]
    return {v.op: v for v in values if isinstance(v, type) and issubclass(v, OpSuite) and hasattr(v, "op")}


SUITES = suites()
NAMES = [name for name in backends.ORDER if name != "cpu"]
SERVERS = [(op, name) for op in sorted(SUITES) for name in NAMES if op in backends.table(name)]
RUNS = [(op, name, case, dtype) for op, name in SERVERS for case in SUITES[op].cases for dtype in case.dtypes]


def test_every_op_is_here():
    """Also without a GPU: a file that cannot be imported there would take all these tests along."""
    assert set(SUITES) == set(backends.table("reference"))
    assert {(op, name) for op, name, *_ in RUNS} == set(SERVERS) and {name for _, name in SERVERS} >= set(OWN)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("op, name, case, dtype", RUNS, ids=[f"{o}-{n}-{c.name}-{str(d)[6:]}" for o, n, c, d in RUNS])
def test_values(op, name, case, dtype):
    """A case that the backend refuses is a skip with its reason."""
    suite = SUITES[op]()
    inputs = case.inputs(dtype)
    exact = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}
    with backends.force("reference"):
        same_outputs, same_grads, douts = run(suite.function, case, inputs)
        true_outputs, true_grads, _ = run(suite.function, case, exact, douts)
    try:
        with backends.force(name), poisoned(warn_only=True):  # cuBLAS is not deterministic by itself
            outputs, grads = run_on(suite, case, inputs, douts)
    except backends.BackendRefused as refusal:
        pytest.skip(str(refusal))
    for i, triple in enumerate(zip(outputs, same_outputs, true_outputs, strict=True)):
        assert_2x(f"output {i}", case.ulps, *triple, further=suite.allowed.get((name, dtype, i), 0))
    for leaf, grad in grads.items():
        assert_2x(f"gradient of {leaf}", case.ulps, grad.contiguous(), same_grads[leaf], true_grads[leaf])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("op, name", [pair for pair in SERVERS if pair[1] in OWN])
def test_the_plainest_case_is_served(op, name):
    suite = SUITES[op]()
    place, dtype = suite.plainest.get(name, (0, FP32))
    with backends.force(name):  # a refusal is a failure
        suite.function(**moved(suite.cases[place].inputs(dtype), DEVICE))


def run_on(suite, case, inputs, douts):
    """`harness.run` on the device, results back on the CPU; the cotangents are the same ones, in their own dtypes."""
    outputs, grads, _ = run(suite.function, case, moved(inputs, DEVICE), [d.to(DEVICE) for d in douts])
    return tuple(o.cpu() for o in outputs), {n: g.cpu() for n, g in grads.items()}


def moved(inputs, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
