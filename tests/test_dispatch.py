"""The short way of a plain call (no tracing, mode, transform or profiler) and the way through torch's op are one op."""

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from uvg_engine import backends, ops
from uvg_engine.backends import plans
from uvg_engine.ops import _alone, _registry


def rows(seed):
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def plain(monkeypatch):
    """Whether each call was plain, in order. Without plans, which ask once (tests/test_plans.py)."""
    seen, alone = [], _registry.alone
    monkeypatch.setattr(_registry, "alone", lambda args: seen.append(alone(args)) or seen[-1])
    with plans.kept(False):
        yield seen


def test_both_ways_give_the_same_bits_and_gradients(plain):
    h, y = rows(0).requires_grad_(), rows(1).requires_grad_()
    out, want = ops.gated_residual(h, y), torch.ops.uvg.gated_residual(h, y, None, None)
    assert plain == [True] and torch.equal(out, want)
    grads, want_grads = (torch.autograd.grad(o, (h, y), rows(2)) for o in (out, want))
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_what_follows_may_give_no_gradient():
    x, weight = rows(0).requires_grad_(), rows(1)[:, :8].contiguous().requires_grad_()
    mean_and_more = torch.ops.uvg.modulated_layer_norm(x, None, None, None, None, None, 1e-6)
    for y in (ops.linear(x, weight), torch.ops.uvg.linear(x, weight, None, "none", None, True)[0], *mean_and_more[:1]):
        (WithoutGradient.apply(y) + 0 * x.sum()).backward()
        assert not x.grad.any() and weight.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradient_is_plain(plain, mode):
    h = rows(0).requires_grad_()
    with mode():
        assert not ops.gated_residual(h, rows(1)).requires_grad
    assert plain == [True]


def test_a_negated_view_is_read_as_its_values(plain):
    y = torch.view_as_complex(rows(0).unflatten(1, (4, 2)).contiguous()).conj().imag
    assert y.is_neg()
    h = torch.zeros(5, 4)
    assert torch.equal(ops.gated_residual(h, y), h + y.clone())
    assert plain == [False]


def test_a_profiler_sees_the_op():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.gated_residual(rows(0), rows(1))
    assert any(event.name == "uvg::gated_residual" for event in profile.events())


def test_a_function_mode_sees_the_op():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        ops.gated_residual(rows(0), rows(1))
    assert "uvg.gated_residual.default" in seen


@pytest.mark.parametrize("device, expected", [("cpu", True), ("meta", False)])
def test_a_default_device_of_the_cpu_leaves_a_call_plain(plain, device, expected):
    h, y = rows(0), rows(1)
    with torch.device(device):
        out = ops.gated_residual(h, y)
    assert plain == [expected] and torch.equal(out, h + y)


def test_another_default_device_at_import_changes_nothing():
    lines = (
        "import torch",
        "torch.set_default_device('meta')",
        "from uvg_engine.ops._registry import alone",
        "torch.set_default_device('cpu')",
        "assert alone((torch.ones(1),)) and not alone((torch.ones(1, device='meta'),))",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_a_function_mode_within_a_default_device_sees_the_op(plain):
    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with torch.device("cpu"), Watch():
        ops.gated_residual(rows(0), rows(1))
    assert plain == [False]


def test_vmap_maps(plain):
    h, y = (torch.stack([rows(seed), rows(seed + 1)]) for seed in (0, 2))
    assert torch.equal(
        torch.vmap(ops.gated_residual)(h, y), ops.gated_residual(h.flatten(0, 1), y.flatten(0, 1)).view_as(h)
    )
    assert not plain[0]


def test_a_subclass_with_a_torch_function_sees_the_op():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    ops.gated_residual(rows(0).as_subclass(Watched), rows(1))
    assert "uvg.gated_residual.default" in seen


def test_a_torch_that_cannot_tell_dispatches(plain, monkeypatch):
    monkeypatch.setattr(_alone, "CAN_TELL", False)
    ops.gated_residual(rows(0), rows(1))
    assert plain == [False]


def test_forward_mode_is_refused():
    with pytest.raises(NotImplementedError, match="gated_residual has no forward-mode derivative"):
        torch.func.jvp(ops.gated_residual, (rows(0), rows(1)), (rows(2), rows(3)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows(0), rows(1))
        with pytest.raises(NotImplementedError, match="gated_residual has no forward-mode derivative"):
            ops.gated_residual(dual, rows(2))
        assert torch.equal(ops.gated_residual(rows(0), rows(1)), rows(0) + rows(1))


@pytest.mark.parametrize(
    "differentiated",
    [
        torch.func.grad,
        lambda f: lambda h, y: torch.func.vjp(f, h, y),
        lambda f: torch.func.jacrev(torch.func.grad(f)),
        lambda f: lambda h, y: torch.func.grad(lambda h: torch.vmap(f)(h, y[None]).sum())(h[None]),
        lambda f: lambda h, y: torch.vmap(torch.func.grad(f))(h[None], y[None]),
    ],
)
def test_gradients_of_torch_func_are_refused(differentiated):
    rule = "gated_residual has no gradient under torch.func; use torch.autograd.grad"
    with pytest.raises(NotImplementedError, match=rule):
        differentiated(lambda h, y: ops.gated_residual(h, y).sum())(rows(0), rows(1))


def test_gradients_of_torch_func_may_pass_by_an_op():
    h, y = rows(0), rows(1)

    def loss(scale):
        with torch.no_grad():
            unseen = ops.gated_residual(h * scale, y)
        return (scale * (ops.gated_residual(h, y) + unseen)).sum()

    torch.testing.assert_close(torch.func.grad(loss)(torch.tensor(1.0)), 2 * (h + y).sum())


@plans.kept(False)  # they ask neither ORDER nor the tables again
def test_a_call_follows_every_change_of_what_serves_it(monkeypatch):
    """Nothing that an earlier call of the same arguments found is taken over."""
    x, weight, ran = rows(0), rows(1), []
    for name in ("reference", "cpu"):
        if (kernel := backends.table(name).get("linear")) is not None:
            noted = replace(kernel, forward=lambda *args, n=name, f=kernel.forward: ran.append(n) or f(*args))
            monkeypatch.setitem(backends.table(name), "linear", noted)

    def served():
        ops.linear(x, weight)
        return ran.pop()

    monkeypatch.delenv("UVG_BACKENDS", raising=False)
    first = served()
    monkeypatch.setenv("UVG_BACKENDS", "reference")
    assert served() == "reference"
    monkeypatch.setenv("UVG_BACKENDS", "nobody")
    with pytest.raises(ValueError, match="UVG_BACKENDS must list backends"):
        served()
    monkeypatch.delenv("UVG_BACKENDS")
    assert served() == first
    with backends.force("reference"):
        assert served() == "reference"
    with monkeypatch.context() as patched:
        patched.setattr(backends, "ORDER", ("reference", *backends.ORDER[:-1]))
        assert served() == "reference"
    assert served() == first


def test_a_call_follows_a_span_table_that_is_written_to(plain):
    h, gate, spans = rows(0), rows(1)[:1], torch.tensor([[0, 5]], dtype=torch.int32)
    assert not torch.equal(ops.gated_residual(h, h, gate, spans), h)
    spans.numpy()[:] = [0, 0]  # torch's version does not see it
    assert torch.equal(ops.gated_residual(h, h, gate, spans), h)
    spans[0, 1] = 6
    with pytest.raises(ValueError, match=r"spans must lie in \[0, 5\), got \[\[0, 6\]\]"):
        ops.gated_residual(h, h, gate, spans)
    assert plain == [True, True, True]


def test_a_call_follows_grad_mode_and_compile(plain):
    x, weight = rows(0), rows(1).requires_grad_()
    with torch.no_grad():
        want = ops.linear(x, weight, activation="gelu_tanh")
    assert not want.requires_grad
    out = ops.linear(x, weight, activation="gelu_tanh")
    assert out.requires_grad and torch.equal(out, want)
    compiled = torch.compile(lambda x, w: ops.linear(x, w, activation="gelu_tanh"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.linear(x, weight, activation="gelu_tanh"), want)
    strided = torch.cat([x, x], 1)[:, ::2]
    assert torch.equal(ops.linear(strided, weight), ops.linear(strided.contiguous(), weight))


def test_a_forced_function_runs_in_many_threads():
    wrong, all_in = [], threading.Barrier(4)

    @backends.force("reference")
    def forced():
        all_in.wait()
        return backends.forced()

    def loop():
        try:
            wrong.extend(name for name in (forced() for _ in range(10)) if name != "reference")
        except Exception as error:
            wrong.append(error)
            all_in.abort()

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
