"""All tensors of a call are on one device: another one is told by name. On the CPU nothing is paid for it: torch gives
a call that has a tensor elsewhere to what serves there."""

import pytest
import torch
from harness import FP32
from test_on_gpu import SUITES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from uvg_engine import ops

READ_ON_HOST = {"row_spans"}


def tensors(op):
    """Their names in the first case; none where there is but one."""
    names = [name for name, value in SUITES[op].cases[0].inputs(FP32).items() if isinstance(value, Tensor)]
    return names if len(names) > 1 else []


def told(name, its, others):
    """The message about tensor `name` on `its` device, which may be the first, to which the others are compared."""
    name = name.removeprefix("norm_")  # the norm's own name for it
    return rf"^{name} must be on {others} like \w+, got {its}$|^\w+ must be on {its} like {name}, got {others}$"


CASES = [(op, name) for op in sorted(SUITES) for name in tensors(op)]


@pytest.mark.parametrize("gradient", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("op, name", CASES)
def test_one_on_meta_is_told(op, name, gradient):
    suite, case = SUITES[op](), SUITES[op].cases[0]
    inputs = case.inputs(FP32)
    if gradient:
        inputs |= {name: value.requires_grad_() for name, value in case.leaves(inputs).items()}
    for _ in range(3):  # then there is a plan
        suite.function(**inputs)
    with pytest.raises(ValueError, match=told(name, "meta", "cpu")):
        suite.function(**inputs | {name: inputs[name].detach().to("meta")})


def on_gpu(x):
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


@pytest.mark.parametrize("op, name", [(op, name) for op, name in CASES if name not in READ_ON_HOST])
def test_one_on_the_host_is_told_of_a_gpu(op, name):
    """As tracing sees them, where no GPU is needed."""
    suite, case = SUITES[op](), SUITES[op].cases[0]
    with FakeTensorMode() as mode:
        here = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in case.inputs(FP32).items()}
        there = {n: on_gpu(x) if isinstance(x, Tensor) and n not in READ_ON_HOST else x for n, x in here.items()}
        suite.function(**there)
        with pytest.raises(ValueError, match=told(name, "cpu", "cuda:0")):
            suite.function(**there | {name: here[name]})


def test_the_message_names_it():
    h, gate, spans = torch.ones(2, 4), torch.ones(1, 4), torch.tensor([[0, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^gate must be on cpu like h, got meta$"):
        ops.gated_residual(h, h, gate.to("meta"), spans)
