"""Every op's own cases on a CUDA device, on each backend that has the op: the 2x rule against fp64 on the CPU."""

import importlib
from pathlib import Path

import pytest
import torch
from harness import FP32, OpSuite, as_tuple, assert_2x, cotangents, poisoned, run

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


def test_a_tensor_named_twice_is_moved_once():
    x = torch.ones(3)
    there = moved({"spans": x, "norm_spans": x, "other": x.clone(), "eps": 1.0}, "meta")
    assert there["spans"] is there["norm_spans"] is not there["other"] and there["eps"] == 1.0
    assert there["spans"].device.type == "meta"


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
        has_backward = backends.table(name)[op].backward is not None
        # warn_only: cuBLAS is not deterministic by itself
        with backends.force(name), torch.set_grad_enabled(has_backward), poisoned(warn_only=True):
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


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("op, name", [pair for pair in SERVERS if pair[1] in OWN])
def test_compiled(op, name, monkeypatch):
    """The same bits inside torch.compile without a break of its graph. Compiled code's backward runs in a thread of the
    device, which `backends.force` does not reach."""
    suite = SUITES[op]()
    case = suite.cases[suite.plainest.get(name, (0, FP32))[0]]
    inputs = moved(case.inputs(suite.plainest.get(name, (0, FP32))[1]), DEVICE)
    torch.compiler.reset()
    monkeypatch.setenv("UVG_BACKENDS", name)
    want, want_grads, _ = run(suite.function, case, inputs)
    got, grads, _ = run(torch.compile(suite.function, fullgraph=True, backend="aot_eager"), case, inputs)
    for a, b in zip((*got, *grads.values()), (*want, *want_grads.values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("op, name", [pair for pair in SERVERS if pair[1] in OWN])
def test_cuda_graph(op, name):
    """Forward and backward, captured once, give the bits of plain calls after every input was overwritten."""
    suite, graph, douts = SUITES[op](), torch.cuda.CUDAGraph(), []
    place, dtype = suite.plainest.get(name, (0, FP32))

    def call():
        outputs = as_tuple(suite.function(**inputs))
        followed = [x for x in outputs if x.requires_grad]
        if not douts:
            douts.extend(cotangents(followed))
        return outputs, torch.autograd.grad(followed, list(leaves.values()), douts) if followed else ()

    with backends.force(name):
        for case in (table_case(suite), suite.cases[place]):
            inputs = moved(case.inputs(dtype), DEVICE)
            leaves = {n: value.requires_grad_() for n, value in case.leaves(inputs).items()}
            try:
                call()  # compiles outside of the graph
                break
            except backends.BackendRefused:
                assert case is not suite.cases[place], "the plainest case must be served"
        with torch.cuda.graph(graph):
            outputs, grads = call()
        tensors = {n: x.detach() for n, x in inputs.items() if torch.is_tensor(x)}
        for values, factor in ((tensors, 1.0), (other_values(tensors), -0.5)):
            for n, x in tensors.items():
                x.copy_(values[n])
            for dout in douts:
                dout.mul_(factor)
            graph.replay()
            got = [x.detach().clone() for x in (*outputs, *grads)]
            want, want_grads = call()
            assert all(torch.equal(a, b) for a, b in zip(got, (*want, *want_grads), strict=True))


def table_case(suite):
    """The case with the most tables and numbers of which all change under `other_values`, and of those the smallest
    that is not tiny; else the first."""

    def rank(case):
        tensors = [x for x in case.inputs(FP32).values() if torch.is_tensor(x)]
        size = sum(x.numel() for x in tensors)
        return sum(x.is_floating_point() for x in tensors) - len(tensors), size < 64, size

    def changes(case):
        tables = {n: x for n, x in case.inputs(FP32).items() if torch.is_tensor(x) and not x.is_floating_point()}
        changed = other_values(tables)
        return all(len(x) > 1 and not torch.equal(x, changed[n]) for n, x in tables.items())

    return min(filter(changes, suite.cases), key=rank, default=suite.cases[0])


def other_values(tensors):
    """Other inputs of the same shapes: floats reversed and a little smaller, the rows of tables and numbers in the
    other order, groups with each other's sizes. row_spans, which come in order, stay."""
    changed = {}
    for name, x in tensors.items():
        back = x if name == "row_spans" else x.flip(0)
        changed[name] = 0.75 * back if x.is_floating_point() else x[-1:] - back if name == "group_offsets" else back
    return changed


def run_on(suite, case, inputs, douts):
    """`harness.run` on the device, results back on the CPU; the cotangents are the same ones, in their own dtypes."""
    outputs, grads, _ = run(suite.function, case, moved(inputs, DEVICE), [d.to(DEVICE) for d in douts])
    return tuple(o.cpu() for o in outputs), {n: g.cpu() for n, g in grads.items()}


def moved(inputs, device):
    """What was one tensor stays one: gated_residual_norm is fused where its two tables are the same."""
    there = {id(value): value.to(device) for value in inputs.values() if isinstance(value, torch.Tensor)}
    return {name: there.get(id(value), value) for name, value in inputs.items()}
