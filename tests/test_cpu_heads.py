"""The heads of the cpu backend in every instruction set that runs here, and with any number of threads."""

import functools

import pytest
import torch
from test_cpu_isa import isa_restored, usable  # noqa: F401

from uvg_engine import backends, ops
from uvg_engine.backends import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))
DTYPES = [torch.float32, torch.bfloat16]
ROWS = 400  # more than a task has


def head(dtype, vocab=2500, width=54):
    g = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((ROWS, width), (vocab, width), (vocab,)))
    return x.to(dtype), (weight * width**-0.5).to(dtype), bias.to(dtype)


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def draws_of_the_reference(dtype, temperature):
    names = torch.arange(ROWS)
    with backends.force("reference"):
        return ops.linear_sample(*head(dtype), names, names, names, temperature=temperature)


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_draws_in_every_instruction_set_with_any_threads(isa, dtype, temperature, isa_restored, threads_restored):  # noqa: F811
    native.core().use_isa(isa)
    names = torch.arange(ROWS)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with backends.force("cpu"):
            got = ops.linear_sample(*head(dtype), names, names, names, temperature=temperature)
        assert torch.equal(got, draws_of_the_reference(dtype, temperature))
