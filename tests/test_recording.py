"""What can be done again from a recording, and what is refused."""

import weakref
from functools import partial

import pytest
import torch

from uvg_engine import backends, ops
from uvg_engine.backends import native, packed_weights
from uvg_engine.ops._recording import NotRecordable, Recording

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"recordings are of the native core: {native.why_not()}")

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def own_steps(x):
    """Views, products, constants, writes to what it made, several results, a result that is read by a kernel."""
    table = x[1:].clone()
    table[:, 2:5] -= x[0, 2:5]
    total = torch.zeros(8)
    total += table.sum(0)
    values, places = table.max(1)
    row = torch.cat([total, values, torch.ones(3)])[:8]
    h = ops.gated_residual(x, x.flip(0).t().contiguous().t())
    return ops.linear(h, X, row[:6]), places, x.view(3, 16)


def test_a_replay_reads_what_stands_there_now():
    own = X.clone()
    recording = Recording(lambda: own_steps(own))
    for factor in (1.0, -2.0, 0.5):
        own.copy_(X * factor)
        assert recording.replay()
        for got, want in zip(recording.result, own_steps(own), strict=True):
            assert torch.equal(got, want)
    assert recording.num_bytes >= 6 * 8 * 4


def test_the_memory_of_a_recording_is_nobody_elses():
    own = X.clone()
    recording = Recording(lambda: own_steps(own))
    others = [torch.full((n,), 7.0) for n in range(1, 200)]
    assert recording.replay()
    assert all(bool((other == 7).all()) for other in others)
    assert torch.equal(recording.result[0], own_steps(own)[0])


REFUSED = {
    "a value": lambda: X.sum().item(),
    "a choice": lambda: X + 1 if X.sum() > 0 else X,
    "a shape": lambda: X[X > 0],
    "random numbers": lambda: torch.randn(3),
    "dropout": lambda: torch.nn.functional.dropout(X, 0.5),
    "a foreign tensor": lambda: X[0].add_(0),
    "foreign tensors of a list": lambda: torch._foreach_mul_([X], 1.0),
    "a tensor that grows": lambda: ops.gated_residual(X, X).resize_(60, 80)[:6].mul_(0),
    "a tensor without strides": lambda: X.to_sparse().sum(),
    "a constant that is written to": lambda: torch.tensor([1.0, 2.0]).add_(1),
    "an op of the reference": lambda: ops.gated_residual(X.double(), X.double()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_again_is_refused(what):
    with pytest.raises(NotRecordable):
        Recording(REFUSED[what])
    assert native.core() is native.cpu()


def test_a_function_that_fails_leaves_nothing_behind():
    def fails():
        ops.gated_residual(X, X)
        ops.gated_residual(X, X[1:])

    with pytest.raises(ValueError, match="y must be"):
        Recording(fails)
    assert native.core() is native.cpu()
    assert torch.equal(ops.gated_residual(X, X), X + X)


def test_a_weight_that_is_written_to_ends_a_recording():
    weight, own = torch.nn.Parameter(X.clone()), X.clone()
    with torch.no_grad():
        recording = Recording(lambda: ops.linear(own, weight))
        assert recording.replay()
        weight.mul_(2)
        assert not recording.replay()
        assert torch.equal(Recording(lambda: ops.linear(own, weight)).result, ops.linear(own, weight))


def test_a_forced_backend_is_refused():
    with backends.force("reference"), pytest.raises(NotRecordable, match="not served by the native core"):
        Recording(lambda: ops.gated_residual(X, X))


def test_memory_is_used_again():
    weight = torch.eye(8)

    def chain():
        x = X
        for _ in range(50):
            x = ops.gated_residual(ops.linear(x, weight), x)
            x = ops.linear(x.view(12, 4).reshape(6, 8), weight)
        return x

    own = Recording(chain)
    assert own.num_bytes <= 5 * X.nbytes
    assert own.replay() and torch.equal(own.result, chain())


def test_a_view_keeps_its_memory():
    weight = torch.eye(8)

    def views():
        part = ops.linear(X, weight)[2:4]
        others = [ops.linear(X + k, weight) for k in range(9)]
        return part, others[0].t()[1], sum(others)

    own = Recording(views)
    assert own.replay()
    assert all(torch.equal(got, want) for got, want in zip(own.result, views(), strict=True))


def test_a_replay_that_differs_is_refused():
    def doubles_unseen():
        h = ops.gated_residual(X, X)
        h.numpy()[:] *= 2
        return h

    with pytest.raises(NotRecordable, match="a replay gave another result"):
        Recording(doubles_unseen)


def test_packed_weights_are_not_the_recordings_own():
    weight = torch.eye(8)
    recording = Recording(partial(ops.linear, X, weight))
    kept = packed_weights.packed(weight, True)
    assert recording.replay() and torch.equal(recording.result, ops.linear(X, weight))
    recording = Recording(partial(ops.linear, X, weight))
    assert packed_weights.packed(weight, True) is kept


def test_packed_weights_go_with_their_weights():
    weights = [torch.eye(8) for _ in range(3)]
    recording = Recording(lambda: [ops.linear(X, weight) for weight in weights])
    words = [weakref.ref(packed_weights.packed(weight, True)) for weight in weights]
    assert recording.replay()
    for weight in weights:
        weight.mul_(2)
        ops.linear(X, weight)
    assert all(old() is None for old in words)
    assert not recording.replay()


def test_only_the_values_of_a_result_are_compared():
    recording = Recording(lambda: torch.empty(100, 8)[:6].copy_(X))
    assert torch.equal(recording.result, X)


def test_a_torch_that_counts_no_users_uses_no_memory_again(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    own = X.clone()
    recording = Recording(lambda: own_steps(own))
    own.mul_(2)
    assert recording.replay() and torch.equal(recording.result[0], own_steps(own)[0])


def test_memory_is_bounded_while_it_is_taken():
    most = []

    def grows():
        for k in range(100):
            most.append(X.repeat(k + 1, 1))

    with pytest.raises(NotRecordable, match="more than 1000 bytes are made"):
        Recording(grows, 1000)
    assert len(most) < 4


def test_what_only_a_kernel_reads_is_held():
    tables = [torch.tensor([[1, 4]], dtype=torch.int32), torch.full((1, 8), 3.0)]
    places = list(map(weakref.ref, tables))
    recording = Recording(partial(ops.gated_residual, X, X, tables[1], tables[0]))
    tables.clear()
    assert all(place() is not None for place in places)
    del recording
    assert all(place() is None for place in places)
