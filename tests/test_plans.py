"""What a plan of a call hangs on: whatever of it changes, the call takes the long way, or another plan."""

import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from uvg_engine import backends, ops
from uvg_engine.backends import native, packed_weights, plans
from uvg_engine.ops import _plans
from uvg_engine.ops._recording import Recording

pytestmark = pytest.mark.skipif(not _plans._begin(), reason="no native core, or a torch without DLPack's functions")


def rows(seed, *shape):
    return torch.randn(*(shape or (5, 8)), generator=torch.Generator().manual_seed(seed))


def known(call, *args, **kwargs):
    """The call's result, after a plan of it was made."""
    for _ in range(2):
        call(*args, **kwargs)
    return call(*args, **kwargs)


def test_a_call_made_twice_is_planned(long_ways):
    h, y = rows(0), rows(1)
    want = ops.gated_residual(h, y)
    assert torch.equal(ops.gated_residual(h, y), want)
    del long_ways[:]
    first, second = ops.gated_residual(h, y), ops.gated_residual(rows(2), rows(3))
    assert not long_ways and torch.equal(first, want) and torch.equal(second, rows(2) + rows(3))
    assert first.data_ptr() != second.data_ptr()


def test_plans_can_be_switched_off(long_ways):
    known(ops.gated_residual, rows(0), rows(1))
    del long_ways[:]
    with plans.kept(False):
        ops.gated_residual(rows(0), rows(1))
    assert long_ways == ["gated_residual"]
    ops.gated_residual(rows(0), rows(1))
    assert len(long_ways) == 1


@pytest.mark.parametrize("older", [False, True], ids=["switched off", "torch without DLPack's functions"])
def test_without_plans_calls_are_served(older):
    """Of a torch before 2.10 the ops are what they were."""
    lines = (
        "import torch",
        *(("del torch.Tensor.__dlpack_c_exchange_api__",) if older else ()),
        "from uvg_engine import backends, ops",
        "from uvg_engine.ops import _plans",
        f"assert _plans._begin() is {not older} and bool(_plans.planners) is {not older}",
        "seen, select, h = [], backends.select, torch.ones(2, 3)",
        "backends.select = lambda op, *rest, **more: seen.append(op) or select(op, *rest, **more)",
        "assert all(torch.equal(ops.gated_residual(h, h), h + h) for _ in range(4))",
        "assert seen == ['gated_residual'] * 4, seen",
    )
    environment = os.environ | {"UVG_PLANS": "1" if older else "0"}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, env=environment)


CHANGES = {
    "shape": lambda h, y: (h[:4], y[:4]),
    "dtype": lambda h, y: (h.bfloat16(), y),
    "strides": lambda h, y: (h.t().contiguous().t(), y),
    "one place": lambda h, y: (h, h),
    "one place, another tensor": lambda h, y: (h, h.view(5, 8)),
    "gradient": lambda h, y: (h.clone().requires_grad_(), y),
    "negative": lambda h, y: (torch.view_as_complex(torch.stack([h, h], -1)).conj().imag, y),
    "subclass": lambda h, y: (h.as_subclass(type("Mine", (torch.Tensor,), {})), y),
    "fp64": lambda h, y: (h.double(), y.double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_tensor_is_another_call(long_ways, change):
    h, y = rows(0), rows(1)
    known(ops.gated_residual, h, y)
    del long_ways[:]
    h, y = change(h, y)
    got = ops.gated_residual(h, y)
    assert long_ways == ["gated_residual"]
    with plans.kept(False):
        assert torch.equal(got, ops.gated_residual(h, y)) and got.requires_grad == h.requires_grad


def test_tensors_without_memory_take_the_long_way(long_ways):
    y = rows(1)
    known(ops.gated_residual, rows(0), y)
    gone = rows(0)
    gone.untyped_storage().resize_(0)
    del long_ways[:]
    zeros = torch._efficientzerotensor((5, 8))
    assert torch.equal(ops.gated_residual(zeros, y), y)
    with pytest.raises(ValueError, match="y must be"):
        ops.gated_residual(gone, y[:2])


def test_one_argument_for_two_is_not_two(long_ways):
    h = rows(0)
    known(ops.gated_residual, h, h)
    del long_ways[:]
    assert torch.equal(ops.gated_residual(h, rows(1)), h + rows(1)) and long_ways == ["gated_residual"]
    known(ops.gated_residual, rows(1), h)
    del long_ways[:]
    assert torch.equal(ops.gated_residual(h, h), 2 * h) and not long_ways


def test_another_number_or_word_is_another_call(long_ways):
    x, weight = rows(0), rows(1)
    want = known(ops.linear, x, weight)
    gelu = known(ops.linear, x, weight, activation="gelu_tanh")
    assert not torch.equal(want, gelu) and torch.equal(ops.linear(x, weight), want)
    y = known(ops.modulated_layer_norm, x, eps=1e-6)
    del long_ways[:]
    assert not torch.equal(ops.modulated_layer_norm(x, eps=1.0), y) and len(long_ways) == 1


def test_numbers_of_a_table_are_read_again(long_ways):
    h, gate, spans = rows(0), rows(1)[:1], torch.tensor([[0, 5]], dtype=torch.int32)
    want = known(ops.gated_residual, h, h, gate, spans)
    other = torch.tensor([[0, 3]], dtype=torch.int32)
    del long_ways[:]
    assert torch.equal(ops.gated_residual(h, h, gate, other)[3:], h[3:]) and long_ways
    spans.numpy()[:] = [0, 0]  # torch's version does not see it
    assert torch.equal(ops.gated_residual(h, h, gate, spans), h)
    spans[0, 1] = 6
    with pytest.raises(ValueError, match=r"spans must lie in \[0, 5\), got \[\[0, 6\]\]"):
        ops.gated_residual(h, h, gate, spans)
    spans[0, 1] = 5
    del long_ways[:]
    assert torch.equal(ops.gated_residual(h, h, gate, spans), want) and not long_ways


def test_ids_are_checked_again(long_ways):
    x, experts = rows(0), torch.tensor([[0, 1]] * 5, dtype=torch.int32)
    known(ops.moe_dispatch, x, experts, 2)
    del long_ways[:]
    assert torch.equal(ops.moe_dispatch(x, 1 - experts, 2)[2], torch.tensor([1, 3, 5, 7, 9, 0, 2, 4, 6, 8]))
    assert not long_ways
    experts[2, 1] = 2
    with pytest.raises(ValueError, match=r"experts must lie in \[0, 2\), got 0 to 2"):
        ops.moe_dispatch(x, experts, 2)
    grouped, order, weights = rows(1, 10, 8), torch.arange(10, dtype=torch.int32), rows(2)[:, :2].contiguous()
    known(ops.moe_combine, grouped, order, weights)
    order[3] = 4
    with pytest.raises(ValueError, match=r"order must name every slot once, got \[4\]"):
        ops.moe_combine(grouped, order, weights)


def test_history_is_asked_for_where_a_coefficient_needs_it(long_ways):
    def step(coefs, last=None):
        x, one, tokens = rows(0, 8), torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        spans = [torch.tensor([[0, count]], dtype=torch.int32) for count in (8, 1)]
        numbers = torch.ones(1), coefs[None], last, None, None
        return ops.flow_step(x, x, None, *numbers, spans[0], tokens, tokens, torch.zeros(1), one, one, spans[1])[0]

    coefs = torch.tensor([0, 1.0, 0, 0, 0, 0, 1, 0, 0, 0.5])
    known(step, coefs)
    del long_ways[:]
    torch.testing.assert_close(step(coefs * 2), 4 * rows(0, 8) + rows(0, 8))
    assert not long_ways  # of each step of a sampler
    coefs[2] = torch.nan
    with pytest.raises(ValueError, match="last must be given where its coefficient is not zero"):
        step(coefs)


def test_what_serves_belongs_to_a_call(long_ways, monkeypatch):
    args = rows(0), rows(1)
    known(ops.gated_residual, *args)
    del long_ways[:]
    with backends.force("reference"):
        assert backends.forced() == "reference"
        known(ops.gated_residual, *args)
    assert len(long_ways) >= 3
    monkeypatch.setenv("UVG_BACKENDS", "nobody")
    with pytest.raises(ValueError, match="UVG_BACKENDS must list backends"):
        ops.gated_residual(*args)
    monkeypatch.setenv("UVG_BACKENDS", "reference")
    del long_ways[:]
    known(ops.gated_residual, *args)
    assert len(long_ways) >= 3
    monkeypatch.delenv("UVG_BACKENDS")
    del long_ways[:]
    ops.gated_residual(*args)
    assert not long_ways


def test_another_number_of_threads_is_another_call(long_ways, threads_restored):
    args = rows(0), rows(1)
    torch.set_num_threads(1)
    known(ops.gated_residual, *args)
    torch.set_num_threads(2)
    del long_ways[:]
    ops.gated_residual(*args)
    assert len(long_ways) == 1


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Ops])
def test_modes_see_a_planned_call(long_ways, mode):
    args = rows(0), rows(1)
    known(ops.gated_residual, *args)
    for _ in range(3):
        with mode() as looking:
            ops.gated_residual(*args)
        assert "uvg.gated_residual.default" in looking.seen


def test_a_profiler_sees_a_planned_call(long_ways):
    args = rows(0), rows(1)
    known(ops.gated_residual, *args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.gated_residual(*args)
    assert any(event.name == "uvg::gated_residual" for event in profile.events())


def test_compile_and_transforms_see_a_planned_call(long_ways):
    h, y = rows(0), rows(1)
    want = known(ops.gated_residual, h, y)
    compiled = torch.compile(lambda h, y: ops.gated_residual(h, y), backend="eager", fullgraph=True)
    assert torch.equal(compiled(h, y), want)
    assert torch.equal(torch.vmap(ops.gated_residual)(h[None], y[None])[0], want)
    with pytest.raises(NotImplementedError, match=r"gated_residual has no gradient under torch\.func"):
        torch.func.grad(lambda h: ops.gated_residual(h, y).sum())(h)
    with pytest.raises(NotImplementedError, match="gated_residual has no forward-mode derivative"):
        torch.func.jvp(ops.gated_residual, (h, y), (h, y))


def test_inference_mode_gives_its_own_tensors(long_ways):
    args = rows(0), rows(1)
    known(ops.gated_residual, *args)
    with torch.inference_mode():
        assert known(ops.gated_residual, *args).is_inference()
    assert not ops.gated_residual(*args).is_inference()


def test_gradients_are_by_plans(long_ways):
    h, y = rows(0).requires_grad_(), rows(1).requires_grad_()
    for _ in range(4):  # the second call plans the way to torch, the third the kernel there
        del long_ways[:]
        grads = torch.autograd.grad(ops.gated_residual(h, y), (h, y), rows(2))
    assert not long_ways and all(torch.equal(grad, rows(2)) for grad in grads)


def test_a_recording_sees_the_kernels(long_ways):
    h, y = rows(0), rows(1)
    known(ops.gated_residual, h, y)
    recording = Recording(lambda: ops.gated_residual(h, y))
    h += 1
    assert recording.replay() and torch.equal(recording.result, h + y)


def test_a_written_weight_is_packed_anew(long_ways):
    x, weight = rows(0), rows(1, 7, 8)
    known(ops.linear, x, weight)
    for write in (lambda: weight.mul_(2), lambda: weight.data.mul_(2), lambda: weight.numpy().__imul__(2)):
        del long_ways[:]
        ops.linear(x, weight)
        assert not long_ways
        write()
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)
        assert long_ways
        known(ops.linear, x, weight)


def test_a_plan_keeps_no_packed_weight(long_ways):
    x, weight = rows(0), rows(1, 7, 8)
    known(ops.linear, x, weight)
    words = weakref.ref(packed_weights.packed(weight, True))
    other = torch.empty(0).set_(weight.untyped_storage(), 0, (7, 8), (8, 1))
    packed_weights.forget(weight)
    assert words() is None
    del long_ways[:]
    torch.testing.assert_close(ops.linear(x, other), x @ other.T)
    assert long_ways
    with packed_weights.kept(False):
        known(ops.linear, x, weight)
    torch.testing.assert_close(ops.linear(x, rows(2, 7, 8)), x @ rows(2, 7, 8).T)


def test_a_weight_of_inference_mode_is_packed_every_time(long_ways):
    x = rows(0)
    with torch.inference_mode():
        weight = rows(1, 7, 8)
    for _ in range(4):
        ops.linear(x, weight)
    assert len(long_ways) >= 4
    usual = rows(1, 7, 8)
    before = packed_weights.kept_bytes()
    ops.linear(x, usual)
    assert packed_weights.kept_bytes() > before


def test_large_arguments_take_the_long_way(long_ways):
    h = torch.zeros(1024, 1025)
    for _ in range(4):
        ops.gated_residual(h, h)  # two times 4 MiB and some
    assert len(long_ways) == 4


def test_a_few_values_of_much_memory_take_the_long_way(long_ways, monkeypatch):
    """What lies between an argument's first value and its last is copied where a plan is made."""
    copied = []
    monkeypatch.setattr(_plans, "_copies", lambda tensors, kept: copied.append(tensors) or tensors)
    h = torch.zeros(1025, 1 << 13)[:, :8]  # 32 KiB of 32 MiB
    for _ in range(4):
        ops.gated_residual(h, h)
    assert len(long_ways) == 4 and not copied


def test_tables_of_ever_new_numbers_stay_few(long_ways):
    h, gate = rows(0, 150, 8), rows(1)[:1]
    for length in range(140):
        spans = torch.tensor([[0, length]], dtype=torch.int32)
        for _ in range(3):
            got = ops.gated_residual(h, h, gate, spans)
        assert torch.equal(got[length:], h[length:])
    assert native.core().plans_of(_plans.planners[ops.gated_residual]) == 128


def test_ever_new_shapes_stay_few(long_ways):
    for count in range(1, 600):
        h = rows(0, count, 8)
        assert torch.equal(known(ops.gated_residual, h, h), h + h)
    assert native.core().plans_of(_plans.planners[ops.gated_residual]) == 512


def test_errors_stay_what_they_are(long_ways):
    for _ in range(4):
        with pytest.raises(ValueError, match="y must be"):
            ops.gated_residual(rows(0), rows(1)[:3])
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            ops.gated_residual(rows(0))


def test_threads_use_one_plan(long_ways):
    given = [(rows(2 * i, 64, 64), rows(2 * i + 1, 64, 64)) for i in range(4)]
    want = [known(ops.modulated_layer_norm, h, y[:1], y[1:2], SPANS) for h, y in given]
    wrong = []

    def many(i):
        h, y = given[i]
        for _ in range(200):
            if not torch.equal(ops.modulated_layer_norm(h, y[:1], y[1:2], SPANS), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=many, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SPANS = torch.tensor([[0, 64]], dtype=torch.int32)
