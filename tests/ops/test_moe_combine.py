"""moe_combine: the shared suite, and its sum written out."""

from __future__ import annotations

import pytest
import torch
from harness import BF16, FP16, FP32, Case, Mistake, OpSuite, normal

from uvg_engine.ops import moe_combine


def case(name, rows, width, top_k, dtypes=(FP32, BF16)):
    def make(g):
        return {
            "rows": normal(g, rows * top_k, width),
            "order": torch.randperm(rows * top_k, generator=g).int(),
            "weights": normal(g, rows, top_k).softmax(-1),
        }

    return Case(name, make, ("weights",), dtypes=dtypes)


class TestMoeCombine(OpSuite):
    op = "moe_combine"
    cases = (
        case("two", 11, 7, 2, dtypes=(FP32, BF16, FP16)),
        case("one", 13, 4, 1),
        case("no-rows", 0, 8, 2),
        case("one-element", 1, 1, 1),
        case("block-and-one", 65, 129, 8),
    )
    mistakes = (
        Mistake(r"rows must be a floating-point \(T\*K, D\)", {"rows": lambda x: x[0]}),
        Mistake(r"rows must be \(22, 7\)", {"rows": lambda x: x[1:]}),
        Mistake(r"weights must be a floating-point \(T, K\)", {"weights": lambda w: w.int()}),
        Mistake("weights must have K > 0 columns", {"weights": lambda w: w[:, :0]}),
        Mistake(r"order must be \(22,\) torch.int32", {"order": lambda o: o.long()}),
        Mistake(r"order must be \(22,\) torch.int32", {"order": lambda o: o[1:]}),
    )


def test_equals_the_sum_written_out():
    made = TestMoeCombine.cases[0].inputs(torch.float64)
    want = torch.zeros(11, 7, dtype=torch.float64)
    for row, slot in zip(made["rows"], made["order"].tolist()):
        want[slot // 2] += made["weights"][slot // 2, slot % 2] * row
    torch.testing.assert_close(moe_combine(**made), want)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_do_not_see_their_neighbours(dtype):
    made = TestMoeCombine.cases[-1].inputs(dtype)
    whole = moe_combine(**made)
    place = torch.argsort(made["order"].long())
    for i in range(65):
        rows = made["rows"][place[8 * i : 8 * i + 8]]
        alone = moe_combine(rows, torch.arange(8, dtype=torch.int32), made["weights"][i : i + 1])
        assert torch.equal(alone[0], whole[i])
