"""The heads of the cpu backend in every instruction set that runs here, and with any number of threads."""

import functools
from pathlib import Path

import pytest
import torch
from test_cpu_isa import sizes_of_one_thread, usable

from uvg_engine import backends, ops
from uvg_engine.backends import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 400  # more than a task has


def head(dtype, vocab=2500, width=54):
    g = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((ROWS, width), (vocab, width), (vocab,)))
    return x.to(dtype), (weight * max(width, 1) ** -0.5).to(dtype), bias.to(dtype)


@functools.cache
def draws_of_the_reference(dtype, temperature):
    names = torch.arange(ROWS)
    with backends.force("reference"):
        return ops.linear_sample(*head(dtype), names, names, names, temperature=temperature)


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_draws_in_every_instruction_set_with_any_threads(isa, dtype, temperature, isa_restored, threads_restored):
    native.core().use_isa(isa)
    names = torch.arange(ROWS)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with backends.force("cpu"):
            got = ops.linear_sample(*head(dtype), names, names, names, temperature=temperature)
        assert torch.equal(got, draws_of_the_reference(dtype, temperature))


def losses_and_gradients(dtype, loss):
    x, weight, bias = head(dtype)
    assert 150 * weight.numel() > sizes_of_one_thread()["HeadProducts"]
    x, weight, bias = x[:150].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    target = torch.arange(150) * 16 % 2500
    extra = {"current": target.roll(1), "rate": torch.linspace(0, 9, 150), "loss": "gkl"} if loss == "gkl" else {}
    losses = ops.linear_cross_entropy(x, weight, bias, target, **extra)
    return losses.detach(), *torch.autograd.grad(losses, (x, weight, bias), torch.linspace(-1, 1, 150))


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["ce", "gkl"])
def test_losses_in_every_instruction_set_with_any_threads(isa, dtype, loss, isa_restored, threads_restored):
    with backends.force("reference"):
        want = losses_and_gradients(dtype, loss)
    native.core().use_isa(isa)
    slack, seen = 1e-5 if dtype == torch.float32 else 1e-2, []
    with backends.force("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(losses_and_gradients(dtype, loss))
    for a, b, c, true in zip(*seen, want, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        torch.testing.assert_close(a, true, rtol=slack, atol=slack * float(true.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_no_width(dtype):
    """The bias alone says what is likely, and alone gets a gradient."""
    names, seen = torch.arange(5), []
    for backend in ("reference", "cpu"):
        x, weight, bias = (value.requires_grad_() for value in head(dtype, vocab=40, width=0))
        with backends.force(backend):
            losses = ops.linear_cross_entropy(x[:5], weight, bias, names)
            picked = ops.linear_sample(x[:5].detach(), weight.detach(), bias.detach(), names, names, names)
            seen.append((losses, *torch.autograd.grad(losses.sum(), (x, weight, bias)), picked))
    for want, got in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("dtype, width", [(torch.float32, 4), (torch.float16, 48)])
def test_no_logits_in_memory(dtype, width):
    """256 rows of 262,144 words would be 256 MiB of logits in fp32, and 48 columns of weights, whose gradient takes 24
    MiB in fp16, another 48 in fp32."""
    rows, vocab = 256, 2**18
    x, weight, bias = (x.to(dtype) for x in (torch.randn(rows, width), torch.randn(vocab, width), torch.zeros(vocab)))
    names = torch.arange(rows)

    def run():
        with backends.force("cpu"):
            ops.linear_sample(x, weight, bias, names, names, names)
            leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
            torch.autograd.grad(ops.linear_cross_entropy(*leaves, names).sum(), leaves)

    assert peak_above_start(run) < 64 * 2**20


def peak_above_start(call):
    """Bytes that the process held more at its fullest than before the call."""

    def told(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = told("VmRSS")
    call()
    return told("VmHWM") - before
