"""What a CUDA graph asks of the kernels: their launches, collected once, give right results again after inputs, span
tables and all, were overwritten, whatever lies in the memory that the call asked for."""

import os

import pytest
import torch
from harness import FP32, as_tuple, cotangents, run
from test_on_gpu import SUITES, other_values, table_case

from uvg_engine import backends
from uvg_engine.backends import triton as backend

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton runs kernels without a GPU only where TRITON_INTERPRET=1", allow_module_level=True)

from uvg_engine.kernels import _launch


def spoil(launches, kept):
    """NaN, or the largest integer, into every tensor of the launches that is not one of those kept."""
    keep = {x.untyped_storage().data_ptr() for x in kept}
    for launch in launches:
        for x in _launch.tensors_of(launch.args):
            if x.untyped_storage().data_ptr() not in keep:
                x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)


@pytest.mark.parametrize("op", sorted(backend.TABLE))
def test_launches_may_be_replayed_with_other_inputs(op):
    suite = SUITES[op]()
    case = table_case(suite)
    inputs = case.inputs(FP32)
    leaves = {name: value.requires_grad_() for name, value in case.leaves(inputs).items()}
    with backends.force("triton"), _launch.recording(_launch.SM80) as launches:
        outputs = as_tuple(suite.function(**inputs))
        douts = cotangents(outputs)
        followed = [x for x in outputs if x.requires_grad]
        grads = torch.autograd.grad(followed, list(leaves.values()), douts) if followed else ()
    tensors = {name: x.detach() if x.requires_grad else x for name, x in inputs.items() if torch.is_tensor(x)}
    changed = other_values(tensors)
    for values, factor in ((tensors, 1.0), (changed, -0.5)):
        for name, x in tensors.items():
            x.copy_(values[name])
        for dout in douts:
            dout.mul_(factor)
        with backends.force("triton"):
            want, want_grads, _ = run(suite.function, case, inputs | tensors, douts)
        spoil(launches, [*tensors.values(), *douts])
        for launch in launches:
            launch.kernel[launch.grid](*launch.args, **launch.options)
        for a, b in zip((*outputs, *grads), (*want, *want_grads.values()), strict=True):
            assert torch.equal(a, b)
