"""linear_cross_entropy: the shared suite, both losses against their formulas, and the memory it may hold."""

from __future__ import annotations

from types import MappingProxyType

import gpu_device
import pytest
import torch
from harness import BF16, FP16, FP32, FP64, Case, DifferentiableOpSuite, Mistake, normal, run
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from uvg_engine import backends
from uvg_engine.backends import native, triton
from uvg_engine.ops import linear_cross_entropy
from uvg_engine.reference import linear_cross_entropy as reference


def head(g, rows, width, vocab, gain=1.0):
    return {
        "x": gain * normal(g, rows, width),
        "weight": normal(g, vocab, width) * width**-0.5,
        "bias": normal(g, vocab),
        "target": torch.randint(vocab, (rows,), generator=g),
    }


def gkl(g, rows, width, vocab, gain=1.0):
    made = head(g, rows, width, vocab, gain)
    current = torch.randint(vocab, (rows,), generator=g)
    current[::2] = made["target"][::2]  # half of the tokens are there already
    rate = 20 * torch.rand(rows, generator=g, dtype=FP64)
    return made | {"current": current, "rate": rate, "loss": "gkl"}


def case(name, make, *args, **kwargs):
    return Case(name, lambda g: make(g, *args, **kwargs), ("rate",), constant=("rate",))


class TestLinearCrossEntropy(DifferentiableOpSuite):
    op = "linear_cross_entropy"
    cases = (
        case("gkl", gkl, 6, 3, 7),
        case("ce", head, 5, 3, 7),
        case("ce-prime", head, 13, 17, 1031),
        case("gkl-prime", gkl, 13, 17, 1031),
        case("one-word", head, 3, 4, 1),
        case("no-rows", gkl, 0, 4, 5),
        case("one-row", gkl, 1, 5, 11),
        case("ce-no-rows", head, 0, 4, 5),
        case("tile-and-one", gkl, 3, 8, 1025),
        case("sharp", gkl, 9, 16, 129, gain=50.0),
        case("block-and-one", head, 65, 33, 257),
    )
    interpreted = MappingProxyType(dict.fromkeys(("gkl-prime", "tile-and-one"), (BF16,)))
    mistakes = (
        Mistake(r"x must be a floating-point \(L, D\)", {"x": lambda x: x[0]}),
        Mistake(r"weight must be a floating-point \(V, D\)", {"weight": lambda w: w[0]}),
        Mistake(r"weight must be \(7, 3\) torch.float32", {"weight": lambda w: w[:, 1:]}),
        Mistake(r"weight must be \(7, 3\) torch.float32", {"weight": lambda w: w.double()}),
        Mistake("weight must have V > 0 rows", {"weight": lambda w: w[:0]}),
        Mistake(r"bias must be \(7,\) torch.float32", {"bias": lambda b: b[1:]}),
        Mistake(r"target must be \(6,\) torch.int64", {"target": lambda t: t.int()}),
        Mistake(r"current must be \(6,\) torch.int64", {"current": lambda t: t[1:]}),
        Mistake(r"rate must be \(6,\)", {"rate": lambda r: r[1:]}),
        Mistake(r"rate must be a floating-point \(L\)", {"rate": lambda r: r.int()}),
        Mistake("rate must not require a gradient", {"rate": lambda r: r.clone().requires_grad_()}),
        Mistake("loss must be one of ce, gkl", {"loss": "mse"}),
        Mistake("current and rate must be given for loss='gkl' and only then", {"loss": "ce"}),
        Mistake("current and rate must be given for loss='gkl' and only then", {"rate": None}),
        Mistake(r"target must lie in \[0, 7\)", {"target": lambda t: t - 7}),
        Mistake(r"current must lie in \[0, 7\)", {"current": lambda t: t + 7}),
    )


def test_ce_equals_cross_entropy_of_torch():
    made = head(torch.Generator().manual_seed(0), 9, 5, 11)
    logits = functional.linear(made["x"], made["weight"], made["bias"])
    want = functional.cross_entropy(logits, made["target"], reduction="none")
    torch.testing.assert_close(linear_cross_entropy(**made), want)


def test_gkl_equals_its_formula():
    made = gkl(torch.Generator().manual_seed(0), 9, 5, 11)
    p = functional.linear(made["x"], made["weight"], made["bias"]).softmax(-1)
    moves = (made["current"] != made["target"]).double()
    p_current, p_target = (p.gather(1, made[n][:, None])[:, 0] for n in ("current", "target"))
    want = -made["rate"] * (p_current - (1 - moves) + moves * p_target.log())
    torch.testing.assert_close(linear_cross_entropy(**made), want)
    assert 0 < moves.sum() < 9 and bool((want >= 0).all())


def test_ce_of_a_head_of_zeros_is_log_v():
    made = head(torch.Generator().manual_seed(0), 5, 3, 7)
    zero = {n: torch.zeros_like(made[n]) for n in ("weight", "bias")}
    torch.testing.assert_close(linear_cross_entropy(**(made | zero)), torch.full((5,), 7.0).double().log())


def pair(loss, dtype=FP32):
    """The cases named "gkl" and "ce" of the suite."""
    return next(c for c in TestLinearCrossEntropy.cases if c.name == loss).inputs(dtype)


@pytest.mark.parametrize("loss", ["ce", "gkl"])
def test_a_common_shift_of_the_logits_changes_nothing(backend, loss):
    made = pair(loss)
    got = linear_cross_entropy(**(made | {"bias": made["bias"] + 3}))
    torch.testing.assert_close(got, linear_cross_entropy(**made), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["ce", "gkl"])
def test_a_permutation_of_the_words_changes_nothing(backend, loss):
    made = pair(loss)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    places = order.argsort()
    turned = {n: made[n][order] for n in ("weight", "bias")}
    turned |= {n: places[made[n]] for n in ("target", "current") if n in made}
    got = linear_cross_entropy(**(made | turned))
    torch.testing.assert_close(got, linear_cross_entropy(**made), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["ce", "gkl"])
def test_a_batch_is_the_sum_of_its_parts(backend, loss):
    """Losses and dx row by row; dweight and dbias add up. A permutation of rows permutes."""
    case = next(c for c in TestLinearCrossEntropy.cases if c.name == f"{loss}-prime")
    made = case.inputs(FP32)
    (whole,), grads, (douts,) = run(linear_cross_entropy, case, made)
    rows = [n for n in ("x", "target", "current", "rate") if n in made]
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    total = {n: torch.zeros_like(made[n]) for n in ("weight", "bias")}
    for part in (order[:1], order[1:6], order[6:]):
        (losses,), mine, _ = run(linear_cross_entropy, case, made | {n: made[n][part] for n in rows}, [douts[part]])
        torch.testing.assert_close(losses, whole[part], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine["x"], grads["x"][part], rtol=1e-5, atol=1e-5)
        total = {n: total[n] + mine[n] for n in total}
    for name, value in total.items():
        torch.testing.assert_close(value, grads[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_rows_gradient_has_the_bits_of_alone_beside_many(on_cpu, dtype):
    """Beside so many rows that the vocabulary is walked in shorter steps."""
    made = case("many", head, 1500, 3, 1600).inputs(dtype)
    g = torch.randn(1500, generator=torch.Generator().manual_seed(5))
    gradients = []
    for rows in (slice(None), slice(0, 2)):
        x = made["x"][rows].clone().requires_grad_()
        loss = linear_cross_entropy(**(made | {"x": x, "target": made["target"][rows]}))
        gradients.append(torch.autograd.grad(loss, x, g[rows].to(loss.dtype))[0])
    assert torch.equal(gradients[0][:2], gradients[1])


@pytest.mark.parametrize("loss", ["ce", "gkl"])
def test_the_gradient_of_the_bias_sums_to_zero(backend, loss):
    case = next(c for c in TestLinearCrossEntropy.cases if c.name == f"{loss}-prime")
    _, grads, _ = run(linear_cross_entropy, case, case.inputs(FP32))
    assert abs(float(grads["bias"].sum())) <= 1e-5 * float(grads["bias"].abs().sum())


def test_gkl_is_linear_in_the_rate_and_zero_at_rate_zero(backend):
    made = pair("gkl")
    loss = linear_cross_entropy(**made)
    assert torch.equal(linear_cross_entropy(**(made | {"rate": 2 * made["rate"]})), 2 * loss)
    assert not linear_cross_entropy(**(made | {"rate": 0 * made["rate"]})).any()


def test_a_sure_head_pays_nothing_and_a_wrong_one_what_it_missed(backend):
    target = torch.tensor([1, 2])
    made = {"x": torch.eye(2), "weight": torch.zeros(3, 2), "bias": torch.tensor([0.0, 500.0, 0.0]), "target": target}
    torch.testing.assert_close(linear_cross_entropy(**made), torch.tensor([0.0, 500.0]))


@pytest.mark.parametrize("make", [head, gkl])
def test_chunks_do_not_show(make, monkeypatch):
    made = make(torch.Generator().manual_seed(0), 11, 4, 7)
    results = []
    for elements in (1, 20, 1 << 22):
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", elements)
        leaves = [made[n].detach().requires_grad_() for n in ("x", "weight", "bias")]
        with backends.force("reference"):
            loss = linear_cross_entropy(*leaves, **{n: v for n, v in made.items() if n not in ("x", "weight", "bias")})
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The largest number of elements of any result made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_never_all_logits_at_once(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 4096)
    made = gkl(torch.Generator().manual_seed(0), 64, 4, 512)
    args = [made[n] for n in ("x", "weight", "bias", "target", "current", "rate", "loss")]
    with Largest() as largest:
        loss, lse, p_current = reference.forward(*args)
        reference.backward(torch.ones_like(loss), lse, p_current, *args)
    assert largest.elements <= 4096


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("on", [*map(gpu_device.marked, ("triton", *gpu_device.names("linear_cross_entropy")))])
def test_steps_of_tritons_backward_do_not_show(dtype, on, monkeypatch):
    """Three steps of 1024 words give the bits of one: the sums go on where the last step left them."""
    if on == "triton" and not triton.interpreting():
        pytest.skip("Triton runs kernels without a GPU only where TRITON_INTERPRET=1")
    kernels = pytest.importorskip("uvg_engine.kernels.linear_cross_entropy")
    made = case("steps", gkl, 5, 17, 2100).inputs(dtype)
    results = []
    for elements in (1, 1 << 25):
        monkeypatch.setattr(kernels, "STEP_ELEMENTS", elements)
        with gpu_device.forced(on) as backend:
            results.append(TestLinearCrossEntropy().assert_right(case("steps", gkl, 5, 17, 2100), made, dtype, backend))
    assert kernels.step_words(5, 2100) == 3072
    (_, one, _), (_, other, _) = results
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_logit_without_a_finite_value_gives_the_references_loss(value, dtype):
    """Word 900 has it: the target of one row of three, in neither the first panel nor the last tile."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = normal(g, 3, 8).to(dtype), normal(g, 2100, 8).to(dtype), torch.zeros(2100, dtype=dtype)
    bias[900] = value
    losses = {}
    for name in ("cpu", "reference"):
        with backends.force(name):
            losses[name] = linear_cross_entropy(x, weight, bias, torch.tensor([3, 900, 2099]))
    torch.testing.assert_close(losses["cpu"], losses["reference"], rtol=1e-2, atol=1e-5, equal_nan=True)
