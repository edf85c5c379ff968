"""window_attention: the shared suite, and what a window over blocks of video must keep."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from harness import BF16, FP16, FP32, FP64, Case, DifferentiableOpSuite, Mistake, normal, spans
from test_flash_attention import table

from uvg_engine.ops import flash_attention, window_attention


def grids(*samples):
    """int32 [B, 4] of (start, F, Y, X)."""
    return torch.tensor(samples, dtype=torch.int32).reshape(len(samples), 4)


def attention(g, rows, heads, head_dim, video, text, **numbers):
    q, k, v = (normal(g, rows, heads, head_dim) for _ in range(3))
    return {"q": q, "k": k, "v": v, "video_spans": grids(*video), "text_spans": spans(*text), **numbers}


def case(name, *args, **kwargs):
    return Case(name, lambda g: attention(g, *args, **kwargs))


NEAR = {"tile": (1, 2, 2), "radius": (1, 0, 1)}


class TestWindowAttention(DifferentiableOpSuite):
    op = "window_attention"
    cases = (
        # Video of both samples, then text of both; tiles that the grids do not fill
        case("two-samples", 33, 1, 8, ((0, 1, 3, 4), (12, 2, 2, 3)), ((24, 4), (28, 3)), **NEAR),
        case("two-heads", 23, 2, 7, ((3, 1, 3, 4),), ((17, 2),), tile=(2, 2, 3), radius=(0, 0, 0)),
        case("wide-and-odd", 23, 1, 65, ((3, 1, 3, 4),), ((17, 2),), tile=(2, 2, 3), radius=(0, 0, 0)),
        case("no-text", 8, 1, 8, ((0, 4, 1, 2),), ((0, 0),), tile=(1, 1, 1), radius=(1, 1, 0)),
        case("no-video", 9, 1, 8, ((0, 0, 0, 0),), ((2, 6),), **NEAR),
        case("no-samples", 5, 1, 8, (), (), **NEAR),
        case("no-rows", 0, 1, 8, ((0, 0, 4, 4),), ((0, 0),), **NEAR),
        case("one-of-each", 2, 1, 1, ((0, 1, 1, 1),), ((1, 1),), **NEAR),
        # Tiles of several blocks of keys, and no whole number of them
        case("large-tiles", 310, 1, 16, ((0, 2, 12, 12),), ((288, 21),), tile=(2, 6, 12), radius=(0, 1, 0)),
        *(case(f"heads-of-{w}", 12, 2, w, ((0, 1, 3, 3),), ((9, 2),), **NEAR) for w in (32, 64, 128)),
    )
    interpreted = MappingProxyType(
        {"two-samples": (FP32, BF16), "large-tiles": (FP16,), "no-text": (BF16,)}
        | {f"heads-of-{width}": (FP32, BF16, FP16) for width in (32, 64, 128)}
    )
    mistakes = (
        Mistake(r"q must be a floating-point \(T, N, H\)", {"q": lambda q: q[0]}),
        Mistake("q must have N > 0 heads of width H > 0", {n: lambda x: x[:, :0] for n in "qkv"}),
        Mistake(r"k must be \(33, 1, 8\) torch.float32", {"k": lambda k: k.double()}),
        Mistake(r"v must be \(33, 1, 8\) torch.float32", {"v": lambda v: v[1:]}),
        Mistake(r"video_spans must be an int32 \(B, 4\)", {"video_spans": lambda s: s[:, :3]}),
        Mistake(r"text_spans must be an int32 \(S, 2\)", {"text_spans": lambda s: s.long()}),
        Mistake("video_spans and text_spans must have the same B", {"text_spans": lambda s: s[:1]}),
        Mistake("tile must be three numbers from 1 on", {"tile": (0, 1, 1)}),
        Mistake("radius must be three numbers from 0 on", {"radius": (1, 1)}),
        Mistake("video_spans must not be negative", {"video_spans": grids((0, 1, -3, -4), (12, 2, 2, 3))}),
        Mistake(r"video_spans must lie in \[0, 33\)", {"video_spans": grids((0, 1, 3, 4), (30, 2, 2, 3))}),
        Mistake(r"text_spans must lie in \[0, 33\)", {"text_spans": spans((24, 4), (28, 6))}),
        Mistake("video_spans and text_spans must not overlap", {"text_spans": spans((24, 4), (27, 3))}),
        Mistake("video_spans and text_spans must not overlap", {"video_spans": grids((0, 1, 3, 4), (11, 2, 2, 3))}),
    )


def two_samples(dtype=FP32):
    return TestWindowAttention.cases[0].inputs(dtype)


def all_spans():
    """The spans of `two_samples` as flash_attention takes them."""
    return table(((0, 12), (24, 4)), ((12, 12), (28, 3)))


def test_a_window_over_everything_is_flash_attention(backend):
    inputs = two_samples() | {"radius": (9, 9, 9)}
    out, lse = window_attention(**inputs)
    want, want_lse = flash_attention(*(inputs[n] for n in "qkv"), all_spans(), all_spans())
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_each_row_sees_what_its_block_and_radius_say():
    """With v the identity, what a row attends to can be read off its output."""
    rows, grid = 26, (2, 3, 4)
    zeros = torch.zeros(rows, 1, rows, dtype=FP64)
    v = torch.eye(rows, dtype=FP64)[:, None]
    numbers = {"tile": (1, 2, 2), "radius": (0, 1, 0)}
    out, _ = window_attention(zeros, zeros, v, grids((0, *grid)), spans((24, 2)), **numbers)
    places = [(f, y, x) for f in range(2) for y in range(3) for x in range(4)]
    for i, (f, y, x) in enumerate(places):
        seen = [j for j, (g, z, w) in enumerate(places) if g == f and abs(y // 2 - z // 2) <= 1 and x // 2 == w // 2]
        assert torch.nonzero(out[i, 0]).flatten().tolist() == [*seen, 24, 25]
    assert out[24:].count_nonzero() == 2 * rows


def test_what_a_window_does_not_hold_changes_nothing(backend):
    inputs = two_samples() | {"tile": (1, 1, 1), "radius": (0, 0, 1)}
    out, lse = window_attention(**inputs)
    changed = inputs | {n: inputs[n].clone() for n in "kv"}
    for name in "kv":
        changed[name][8:12] += 100  # the third line of the first sample's frame
    got, got_lse = window_attention(**changed)
    kept = [*range(8), *range(12, 24), *range(28, 33)]
    assert torch.equal(got[kept], out[kept]) and torch.equal(got_lse[:, kept], lse[:, kept])
    assert (got[[*range(8, 12), *range(24, 28)]] != out[[*range(8, 12), *range(24, 28)]]).any(-1).all()


def test_samples_do_not_see_their_neighbours(backend):
    inputs = two_samples(BF16)
    whole, lse = window_attention(**inputs)
    rows = [*range(12, 24), *range(28, 31)]
    alone = inputs | {n: inputs[n][rows] for n in "qkv"}
    alone |= {"video_spans": grids((0, 2, 2, 3)), "text_spans": spans((12, 3))}
    out, alone_lse = window_attention(**alone)
    assert torch.equal(out, whole[rows]) and torch.equal(alone_lse, lse[:, rows])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_wider_radius_along_an_axis_without_more_blocks_changes_nothing(backend, axis):
    inputs = two_samples() | {"tile": (3, 3, 4), "radius": (0, 0, 0)}
    wider = tuple(int(i == axis) for i in range(3))
    for a, b in zip(window_attention(**inputs), window_attention(**(inputs | {"radius": wider})), strict=True):
        assert torch.equal(a, b)
