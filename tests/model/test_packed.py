"""Samples of different sizes and jobs in one batch: each gets what it would get alone, bitwise where isolated."""

from dataclasses import dataclass
from itertools import permutations

import pytest
import torch
from dense_model import make_config, make_inputs, make_model, relative

from uvg_engine import backends
from uvg_engine.backends import native
from uvg_engine.model import Layout
from uvg_engine.model.blocks import Reading
from uvg_engine.model.layout import Selection


@dataclass
class Request:
    """One sample. grid (0, 0, 0) and length 0 are samples without that stream."""

    grid: tuple
    length: int
    cond_len: int
    time_v: float
    time_t: float
    mask: torch.Tensor | None = None


REQUESTS = [
    Request((2, 3, 5), 7, 6, 731.0, 0.0),  # generate
    Request((1, 4, 3), 5, 1, 0.0, 412.0),  # caption
    Request((3, 1, 1), 9, 3, 250.0, 250.0, torch.arange(9) % 3 != 1),  # joint, a mask with holes
    Request((2, 2, 2), 0, 4, 1000.0, 0.0),  # no text
    Request((0, 0, 0), 4, 2, 0.0, 999.0),  # no video
    Request((1, 1, 1), 1, 1, 1.0, 1000.0),
    Request((2, 3, 5), 7, 6, 90.0, 0.0),  # the sizes of the first
    Request((1, 1, 1), 0, 1, 40.0, 0.0),  # a lone row
    Request((0, 0, 0), 1, 3, 0.0, 555.0),  # another, of text
    Request((1, 1, 1), 0, 1, 930.0, 0.0),
]


def run(model, picks, read=None, **options):
    """The packed call on some requests: a list of (velocity, text hidden) of each; read: whose are read."""
    config, requests = model.config, [REQUESTS[i] for i in picks]
    inputs = [make_inputs(config, 1, REQUESTS[i].grid, REQUESTS[i].length, REQUESTS[i].cond_len, seed=i) for i in picks]
    layout = Layout.build(
        [r.grid for r in requests],
        [r.length for r in requests],
        [r.cond_len for r in requests],
        text_masks=[r.mask for r in requests],
    )
    latents = torch.cat([x[0].flatten() for x in inputs])
    tokens, conds = (torch.cat([x[i][0] for x in inputs]) for i in (1, 4))
    times = (torch.tensor([getattr(r, name) for r in requests]) for name in ("time_v", "time_t"))
    isolate = options.get("isolate", False)
    condition = model.condition_kv(conds, layout.cond_lens, isolate=isolate)
    reading = None if read is None else Reading(Selection.of_read(layout, *read))
    out = model.packed(latents, tokens, layout, *times, condition, reading=reading, **options)
    velocity = latents[:0] if out.velocity is None else out.velocity
    hidden = torch.zeros(0, config.dim) if out.text_hidden is None else out.text_hidden
    cells, lengths = [x[0].numel() for x in inputs], [r.length for r in requests]
    if read is not None:
        cells, lengths = (
            [n * r for n, r in zip(*pair, strict=True)] for pair in ((cells, read[0]), (lengths, read[1]))
        )
    return list(zip(velocity.split(cells), hidden.split(lengths), strict=True))


# widths that leave a tail after the vector registers, and runs that start off a cache line
AWKWARD = {"heads": 1, "head_dim": 40, "ffn_dim": 67, "text_dim": 23, "freq_dim": 10, "in_channels": 3}


@pytest.mark.parametrize("sizes", [{}, AWKWARD])
@torch.no_grad()
def test_together_is_alone(sizes):
    model = make_model(make_config(**sizes))
    together = run(model, range(len(REQUESTS)))
    for i, got in enumerate(together):
        (want,) = run(model, [i])
        assert all(relative(g, w) < 2e-6 for g, w in zip(got, want, strict=True)), i


@pytest.mark.parametrize("sizes", [{}, AWKWARD], ids=["even", "awkward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_isolated_samples_are_bitwise_those_alone(sizes, dtype):
    """Whatever the neighbours, their number and the order."""
    assert_isolated(make_model(make_config(**sizes)).to(dtype))


def test_isolated_with_a_head_of_no_vector_width():
    """The reference's attention takes sample after sample, so any head width keeps its bits."""
    with torch.no_grad(), backends.force("reference"):
        assert_isolated(make_model(make_config(**{**AWKWARD, "head_dim": 34})))


def assert_isolated(model):
    alone = [run(model, [i], isolate=True)[0] for i in range(len(REQUESTS))]
    picks = [range(10), range(9, -1, -1), [3, 0, 5], [0] * 9 + [2], [4, 4], [7, 9, 7, 9, 8], *permutations((1, 2, 4))]
    for pick in picks:
        for i, got in zip(pick, run(model, pick, isolate=True), strict=True):
            assert all(torch.equal(g, w) for g, w in zip(got, alone[i], strict=True)), (i, list(pick))


@torch.no_grad()
def test_isolation_changes_no_more_than_the_order_of_sums():
    model = make_model(make_config())
    for got, want in zip(run(model, range(10), isolate=True), run(model, range(10)), strict=True):
        assert all(relative(g, w) < 2e-6 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_what_is_read_does_not_depend_on_what_is_not(layers):
    model, picks = make_model(make_config(layers=layers)), range(len(REQUESTS))
    read = [i % 2 == 0 for i in picks], [i % 3 == 0 for i in picks]
    full = run(model, picks, isolate=True)
    for i, got in enumerate(run(model, picks, read, isolate=True)):
        for part, want, reads in zip(got, full[i], (read[0][i], read[1][i]), strict=True):
            want = want if reads else want[:0]  # a library's product of fewer queries may round otherwise
            assert torch.equal(part, want) if native.cpu() else relative(part, want) < 2e-6, i


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_a_part_that_nobody_reads_is_not_there(layers):
    model = make_model(make_config(layers=layers))
    full = run(model, [0])
    text_only, video_only = run_parts(model, [False], [True]), run_parts(model, [True], [False])
    assert text_only.velocity is None and video_only.text_hidden is None
    assert relative(video_only.velocity, full[0][0]) < 2e-6 and relative(text_only.text_hidden, full[0][1]) < 2e-6


def run_parts(model, *read):
    x_v, x_t, *_, cond = make_inputs(model.config, 1, REQUESTS[0].grid, 7, 6, seed=0)
    layout = Layout.build([REQUESTS[0].grid], [7], [6])
    condition = model.condition_kv(cond[0], [6])
    reading = Reading(Selection.of_read(layout, *read)) if read else None
    return model.packed(
        x_v.flatten(), x_t[0], layout, torch.tensor([731.0]), torch.zeros(1), condition, reading=reading
    )


@torch.no_grad()
def test_dense_is_packed():
    model = make_model(make_config())
    x_v, x_t, *_, cond = make_inputs(model.config, 1, REQUESTS[0].grid, 7, 6, seed=0)
    velocity, logits = model(x_v, x_t, torch.tensor([731.0]), torch.zeros(1), cond)
    out = run_parts(model)
    assert torch.equal(velocity.flatten(), out.velocity)
    assert torch.equal(logits[0], model.text_logits(out.text_hidden))
