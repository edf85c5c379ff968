"""flash_attention_int8: the shared suite, how far it is from exact attention, what smoothing keys must do."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP32, Case, Mistake, OpSuite
from test_flash_attention import CROSS, MANY, TWO, attention, table

from uvg_engine import backends
from uvg_engine.ops import flash_attention, flash_attention_int8


def case(name, *args, **more):
    return Case(name, lambda g: attention(g, *args, **more), constant=("q", "k", "v"))


class TestFlashAttentionInt8(OpSuite):
    op = "flash_attention_int8"
    cases = (
        case("two-streams", 19, 19, TWO, TWO, 2, 4),
        case("cross", 19, 13, TWO, CROSS, 3, 7),
        case("keys-named-twice", 19, 13, TWO, table(((0, 9), (4, 5)), ((2, 3), (2, 3))), 1, 8),
        case("no-keys-for-one", 19, 13, TWO, table(((0, 0),), ((2, 11),)), 2, 8),
        case("no-queries", 0, 5, table(((0, 0),)), table(((0, 5),)), 2, 8),
        case("one-of-each", 1, 1, table(((0, 1),)), table(((0, 1),)), 1, 1),
        case("many-runs", 70, 70, MANY, MANY, 2, 16),
        case("blocks", 200, 530, table(((0, 200),)), table(((0, 530),)), 1, 72),
    )
    mistakes = (
        Mistake(r"q must be a floating-point \(T, N, H\)", {"q": lambda x: x[0]}),
        Mistake(r"k must be \(19, 2, 4\) torch.float32", {"k": lambda x: x[..., 1:]}),
        Mistake(r"q_spans must lie in \[0, 19\)", {"q_spans": table(((0, 20),), ((0, 0),))}),
        Mistake("q_spans must not overlap", {"q_spans": table(((0, 5),), ((4, 5),))}),
        Mistake("q_spans and k_spans must have the same B", {"k_spans": lambda s: s[:1]}),
        Mistake("flash_attention_int8 has no gradient", {"v": lambda x: x.requires_grad_()}),
    )


def made_in(dtype, *args, seed=0, **more):
    made = attention(torch.Generator().manual_seed(seed), *args, **more)
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in made.items()}


def error(made):
    with backends.force("reference"):
        exact = flash_attention(**{n: v.double() if v.is_floating_point() else v for n, v in made.items()})[0]
    return float((flash_attention_int8(**made).double() - exact).norm() / exact.norm())


ONE = table(((0, 300),))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_error_of_normal_values(backend, dtype):
    assert 2e-3 < error(made_in(dtype, 300, 300, ONE, ONE, 3, 64)) < 0.015


def test_what_all_keys_share_costs_nothing(backend):
    """Without their mean taken away, keys this far from 0 would leave their differences one or two steps."""
    made = made_in(FP32, 300, 300, ONE, ONE, 3, 64)
    want = error(made)
    made["k"] += 60 * torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
    assert error(made) < 1.2 * want


def test_values_of_one_give_one(backend):
    made = made_in(FP32, 19, 19, TWO, TWO, 2, 4)
    made["v"] = torch.ones_like(made["v"])
    torch.testing.assert_close(flash_attention_int8(**made)[torch.arange(12)], torch.ones(12, 2, 4))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_sample_is_what_it_is_alone(backend, dtype):
    """Bitwise, whatever the other samples hold, NaN too, and however many threads work."""
    spans = table(((0, 200), (330, 20)), ((200, 130), (350, 9)))
    made, threads = made_in(dtype, 359, 359, spans, spans, 2, 40), torch.get_num_threads()
    rows = torch.cat([torch.arange(200), torch.arange(330, 350)])
    try:
        torch.set_num_threads(3)
        whole = flash_attention_int8(**made)
        torch.set_num_threads(1)
        own = table(((0, 220),))
        alone = {n: made[n][rows] for n in "qkv"} | {"q_spans": own, "k_spans": own}
        assert torch.equal(flash_attention_int8(**alone), whole[rows])
    finally:
        torch.set_num_threads(threads)
    for name in "qkv":
        made[name][200:330] = torch.nan
    assert torch.equal(flash_attention_int8(**made)[rows], whole[rows])


@pytest.mark.parametrize("name", ["q", "k"])
def test_what_is_no_number_is_seen(backend, name):
    made = made_in(FP32, 19, 19, TWO, TWO, 2, 4)
    made[name][3, 1, 2] = torch.nan
    got, touched = flash_attention_int8(**made)[:, 1], [3] if name == "q" else [0, 1, 2, 3, 4, 12, 13, 14]
    assert got[touched].isnan().all()
