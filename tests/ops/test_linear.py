"""linear: the shared suite, and what its rows must keep."""

from __future__ import annotations

import gc

import pytest
import torch
from harness import BF16, FP16, FP32, Case, DifferentiableOpSuite, Mistake, normal, spans
from torch.nn import functional

from uvg_engine import backends
from uvg_engine.backends import packed_weights
from uvg_engine.ops import linear

WIDE = 16 * 96 + 5  # more depth than one block of sums takes


def layer(g, rows, depth, width, **more):
    made = {"x": normal(g, rows, depth), "weight": normal(g, width, depth) * max(depth, 1) ** -0.5}
    return made | {"bias": normal(g, width)} | more


def case(name, *args, **more):
    return Case(name, lambda g: layer(g, *args, **more))


class TestLinear(DifferentiableOpSuite):
    op = "linear"
    cases = (
        case("spans", 9, 6, 13, row_spans=spans((0, 4), (4, 0), (4, 5))),
        case("gelu", 8, 6, 9, activation="gelu_tanh"),
        case("gelu-spans", 8, 7, 9, activation="gelu_tanh", row_spans=spans((0, 3), (3, 5))),
        Case("no-bias", lambda g: layer(g, 5, 4, 3) | {"bias": None}),
        case("no-rows", 0, 8, 16),
        case("no-rows-gelu", 0, 8, 16, activation="gelu_tanh", row_spans=spans()),
        case("no-depth", 3, 0, 5),
        case("no-width", 3, 4, 0),
        case("one-element", 1, 1, 1),
        case("a-panel-and-one", 7, 33, 65),
        case("six-rows", 6, 32, 64, activation="gelu_tanh"),
        case("many-rows", 397, 17, 131),
        case("two-depth-blocks", 13, WIDE, 48),
    )
    mistakes = (
        Mistake(r"x must be a floating-point \(T, D\)", {"x": lambda x: x[0]}),
        Mistake(r"weight must be a floating-point \(F, D\)", {"weight": lambda w: w.int()}),
        Mistake(r"weight must be \(13, 6\) torch.float32", {"weight": lambda w: w[:, 1:]}),
        Mistake(r"bias must be \(13,\) torch.float32", {"bias": lambda b: b.double()}),
        Mistake("activation must be one of none, gelu_tanh", {"activation": "relu"}),
        Mistake(r"row_spans must be an int32 \(S, 2\)", {"row_spans": lambda s: s.long()}),
        Mistake(r"row_spans must tile \[0, 9\) in order", {"row_spans": spans((0, 4), (5, 4))}),
        Mistake(r"row_spans must tile \[0, 9\) in order", {"row_spans": spans((0, 4), (4, 4))}),
        Mistake(r"row_spans must tile \[0, 9\) in order", {"row_spans": spans((0, 10), (10, -1))}),
    )


def test_is_torch_linear():
    made = layer(torch.Generator().manual_seed(0), 9, 6, 13)
    torch.testing.assert_close(linear(**made), functional.linear(*made.values()))
    want = functional.gelu(functional.linear(*made.values()), approximate="tanh")
    torch.testing.assert_close(linear(**made, activation="gelu_tanh"), want)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("depth, width", [(6, 13), (128, 96), (WIDE, 70)])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_a_span_is_what_it_is_alone(backend, dtype, depth, width, activation):
    """Bitwise, whatever stands beside it, wherever it starts and however many threads work."""
    made = layer(torch.Generator().manual_seed(depth), 211, depth, width)
    made = {name: value.to(dtype) for name, value in made.items()}
    table = spans((0, 1), (1, 7), (8, 0), (8, 92), (100, 111))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = linear(**made, activation=activation, row_spans=table)
        torch.set_num_threads(1)
        for start, length in table.tolist():
            rows = made["x"][start : start + length]
            alone = linear(**(made | {"x": rows}), activation=activation, row_spans=spans((0, length)))
            assert torch.equal(alone, whole[start : start + length])
    finally:
        torch.set_num_threads(threads)


def test_a_span_does_not_see_the_others(backend):
    made = TestLinear.cases[0].inputs(FP32)
    whole = linear(**made)
    made["x"][:4] = torch.nan
    assert torch.equal(linear(**made)[4:], whole[4:])


def test_identity_returns_x_exactly(backend):
    x = normal(torch.Generator().manual_seed(0), 11, 130).to(BF16)
    assert torch.equal(linear(x, torch.eye(130, dtype=BF16)), x)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_slope_of_gelu_far_from_0(on_cpu, dtype):
    """Where the cube of a value is no number any more."""
    x = torch.tensor([1e2, 1e5, 6e12, 1e14, 1e18], dtype=dtype)[:, None]
    x = torch.cat([x, -x]).requires_grad_()
    weight = torch.ones(1, 1, dtype=dtype)
    (slope,) = torch.autograd.grad(linear(x, weight, activation="gelu_tanh").sum(), x)
    torch.testing.assert_close(slope.flatten().float(), torch.tensor([1.0] * 5 + [0.0] * 5), rtol=0, atol=1e-30)


def test_a_row_with_gaps_is_read_in_place(backend):
    made = TestLinear.cases[0].inputs(FP32)
    wide = torch.cat([made["x"], torch.full((9, 3), torch.nan)], 1)
    assert torch.equal(linear(**(made | {"x": wide[:, :6]})), linear(**made))


def test_the_reference_takes_one_span_after_the_other(monkeypatch):
    seen, torchs = [], functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, *rest: seen.append(len(x)) or torchs(x, *rest))
    with backends.force("reference"):
        linear(**TestLinear.cases[0].inputs(FP32))
    assert seen == [4, 5]


def written(weight):
    with torch.no_grad():
        weight.mul_(2)


def written_past_the_version(weight):
    weight.data.mul_(2)


@pytest.mark.parametrize("write", [written, written_past_the_version])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_written_weight_is_read_again(backend, write, dtype):
    made = {name: value.to(dtype) for name, value in layer(torch.Generator().manual_seed(0), 3, 40, 70).items()}
    bias, weight = made.pop("bias"), made["weight"]
    first, twice = linear(**made), linear(**made | {"x": 2 * made["x"]})
    write(weight)
    assert torch.equal(linear(**made), twice) and not torch.equal(first, twice) and bias is not None


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_keeping_packed_weights_changes_no_bit(on_cpu, dtype):
    made = {name: value.to(dtype) for name, value in layer(torch.Generator().manual_seed(0), 30, 40, 70).items()}
    before = packed_weights.kept_bytes()
    with packed_weights.kept(False):
        want = linear(**made)
        assert packed_weights.kept_bytes() == before
    assert torch.equal(linear(**made), want) and packed_weights.kept_bytes() > before
    before = packed_weights.kept_bytes()
    assert torch.equal(linear(**made), want) and packed_weights.kept_bytes() == before


def test_packed_weights_go_with_their_weight(on_cpu):
    made = layer(torch.Generator().manual_seed(0), 30, 40, 70)
    weights, x = torch.stack([made["weight"]] * 2).float(), made["x"].float()
    gc.collect()  # of what other tests left
    before = packed_weights.kept_bytes()
    linear(x, weights[0])
    one = packed_weights.kept_bytes() - before
    linear(x, weights[1])
    linear(x, weights[1])
    assert packed_weights.kept_bytes() - before == 2 * one >= 2 * weights[0].nbytes
    weights.mul_(2)
    linear(x, weights[1])
    assert packed_weights.kept_bytes() - before == 2 * one
    del weights
    gc.collect()
    assert packed_weights.kept_bytes() == before


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_weight_and_its_parts_are_kept_together(on_cpu, dtype):
    """Twice the values of a storage, however wide the words of one are."""
    whole, x = torch.randn(1024, 1024).to(dtype), torch.randn(3, 1024).to(dtype)
    parts = whole.split(256)
    for _ in range(2):
        for weight in (whole, *parts):
            linear(x, weight)
    with packed_weights.watched() as asked:
        for weight in (whole, *parts):
            linear(x, weight)
    assert not any(new for _, _, _, new in asked)


def test_few_of_ever_new_parts_are_kept(on_cpu):
    whole, x = torch.randn(2048, 512).half(), torch.randn(3, 512).half()
    linear(x, whole)
    one = packed_weights.keeper(whole, "linear").words.nbytes
    before = packed_weights.kept_bytes()
    for rows in range(1000, 2000, 100):
        linear(x, whole[:rows])
    assert packed_weights.kept_bytes() - before <= 2 * one


def test_a_write_to_one_row_is_seen(on_cpu):
    """By the version: none of the values that are looked at is in it."""
    x, weight = (
        value.float() for value in (torch.ones(3, 40), layer(torch.Generator().manual_seed(0), 1, 40, 700)["weight"])
    )
    linear(x, weight)
    weight[335].mul_(2)
    assert torch.equal(linear(x, weight), linear(x, weight.clone()))


def test_a_write_behind_torchs_back_can_be_told(on_cpu):
    x, weight = torch.ones(3, 40), layer(torch.Generator().manual_seed(0), 1, 40, 700)["weight"].float()
    stale = linear(x, weight)
    weight.numpy()[335] *= 2
    assert torch.equal(linear(x, weight), stale), "told without need: the docs of packed_weights can be simpler"
    packed_weights.forget(weight)
    assert torch.equal(linear(x, weight), linear(x, weight.clone())) and not torch.equal(linear(x, weight), stale)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_step_is_seen(on_cpu, optimizer):
    """It changes no version, and here one row, none of whose values is looked at."""
    weight = torch.nn.Parameter(torch.ones(700, 40))
    x, step = torch.ones(3, 40), optimizer([weight], lr=0.5, fused=True, weight_decay=0.0)
    with torch.no_grad():
        before, version = linear(x, weight), weight._version
        weight.grad = torch.zeros_like(weight)
        weight.grad[335] = 1.0
        step.step()
        assert weight._version == version, "torch tells it: the hook of packed_weights is not needed any more"
        assert not torch.equal(linear(x, weight), before)
        with packed_weights.kept(False):
            want = linear(x, weight)
        assert torch.equal(linear(x, weight), want)


def test_another_part_may_be_packed_meanwhile(on_cpu):
    """By another thread, while this one adds up what is kept."""
    whole, x = torch.randn(64, 40), torch.ones(3, 40)
    linear(x, whole[:8])
    store = vars(whole.untyped_storage())[packed_weights._NAME]
    one = next(iter(store.values()))

    class Meanwhile:
        version, mark = one.version, one.mark

        @property
        def words(self):
            store["of another thread"] = one
            return one.words

    store["first"] = Meanwhile()
    assert torch.equal(linear(x, whole[8:]), linear(x, whole[8:].clone()))
    assert "of another thread" in store


def test_views_of_ever_new_sizes_do_not_pile_up(on_cpu):
    weight, before = torch.randn(4096, 64), packed_weights.kept_bytes()
    for rows in range(4096, 64, -64):
        linear(weight[:1], weight[:rows])
    assert packed_weights.kept_bytes() - before < 4 * weight.nbytes + (1 << 20)


def test_nothing_is_kept_where_a_gradient_is_wanted(on_cpu):
    made = layer(torch.Generator().manual_seed(0), 30, 40, 70)
    before = packed_weights.kept_bytes()
    linear(made["x"].float(), made["weight"].float().requires_grad_()).sum().backward()
    assert packed_weights.kept_bytes() == before


def test_a_gradients_rows_are_the_same_among_few_and_many():
    """Up to 16 rows of fp32, the cpu backend reads the weight as it lies; it packs it for more."""
    g = torch.Generator().manual_seed(0)
    for width in (48, 50):
        weight, dy = normal(g, 530, width).float(), normal(g, 17, 530).float()
        x = normal(g, 17, width).float().requires_grad_()
        whole = torch.autograd.grad(linear(x, weight), x, dy)[0]
        for rows in (1, 5, 16):
            few = x[:rows].detach().requires_grad_()
            assert torch.equal(torch.autograd.grad(linear(few, weight), few, dy[:rows])[0], whole[:rows])


def test_a_gradient_of_very_few_rows_is_that_beside_a_row_of_zeros():
    """Up to 4 rows of fp32, the cpu backend makes both gradients in one pass each; of 5 by products."""
    g = torch.Generator().manual_seed(0)
    for depth, width in ((16, 5), (528, 67), (1040, 1600)):
        x, weight, bias, dy = (
            normal(g, *shape).float() for shape in ((5, depth), (width, depth), (width,), (5, width))
        )
        for rows in (1, 2, 3, 4):
            few, many = [], []
            for out, count in ((few, rows), (many, 5)):
                given = [t.clone().requires_grad_() for t in (x[:count], weight, bias)]
                d = dy[:count].clone()
                with torch.no_grad():
                    given[0][rows:], d[rows:] = 0, 0
                out += torch.autograd.grad(linear(*given), given, d)
            assert torch.equal(few[0], many[0][:rows]) and torch.equal(few[1], many[1]) and torch.equal(few[2], many[2])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_weight_packed_for_one_call_gives_the_bits_of_a_kept_one(dtype, on_cpu):
    g = torch.Generator().manual_seed(0)
    for depth, width in ((40, 70), (WIDE, 33), (16, 1)):
        x, weight, bias = (normal(g, *shape).to(dtype) for shape in ((97, depth), (width, depth), (width,)))
        for rows in (1, 5, 95, 96, 97):
            with torch.no_grad():
                want = linear(x[:rows], weight, bias, activation="gelu_tanh")
            got = linear(x[:rows], weight.clone().requires_grad_(), bias, activation="gelu_tanh")
            assert torch.equal(got, want)


def test_gradients_of_more_columns_than_are_packed_at_once(on_cpu, threads_restored):
    """One thread makes the weight's by parts of dy's columns and of x's; for many, all lie packed at once."""
    g = torch.Generator().manual_seed(0)
    shapes = (6000, 690), (700, 690), (700,), (6000, 700)
    x, weight, bias, dy = (torch.randn(*shape, generator=g) for shape in shapes)
    seen = []
    for threads in (1, 2, 17):
        torch.set_num_threads(threads)
        given = [value.clone().requires_grad_() for value in (x, weight, bias)]
        seen.append(torch.autograd.grad(linear(*given), given, dy))
    want = dy.double() @ weight.double(), dy.double().T @ x.double(), dy.double().sum(0)
    for one, two, many, true in zip(*seen, want, strict=True):
        assert torch.equal(one, two) and torch.equal(one, many)
        torch.testing.assert_close(one.double(), true, rtol=2e-5, atol=2e-5 * float(true.abs().max()))
