"""Span tables: where the rows of a batch lie."""

import pytest
import torch

from uvg_engine.model import Layout
from uvg_engine.model.patches import patch_grid, patchify, unpatchify

GRIDS, TEXTS, CONDS = [(2, 2, 3), (0, 0, 0), (1, 1, 1)], [3, 4, 0], [5, 1, 2]


def build(**changes):
    return Layout.build(**{"grids": GRIDS, "text_lens": TEXTS, "cond_lens": CONDS, **changes})


def test_rows_are_modality_major_and_tile_the_matrix():
    layout = build()
    assert (layout.num_samples, layout.num_video, layout.num_text, layout.num_rows) == (3, 13, 7, 20)
    assert layout.row_spans.tolist() == [[0, 12], [12, 0], [12, 1], [13, 3], [16, 4], [20, 0]]
    assert layout.rope_spans[:, 2:].tolist() == [[0, *g] for g in GRIDS] + [[1, 0, 0, 0]] * 3
    assert torch.equal(layout.rope_spans[:, :2], layout.row_spans)
    assert layout.query_spans.tolist() == [[[0, 12], [13, 3]], [[12, 0], [16, 4]], [[12, 1], [20, 0]]]
    assert torch.equal(layout.key_spans, layout.query_spans)
    assert layout.cond_spans.tolist() == [[[0, 5]], [[5, 1]], [[6, 2]]]
    assert layout.group_offsets.tolist() == [0, 13, 20]
    assert layout.text_spans.tolist() == [[0, 3], [3, 4], [7, 0]]
    tables = (layout.row_spans, layout.rope_spans, layout.query_spans, layout.cond_spans, layout.group_offsets)
    assert all(table.dtype == torch.int32 for table in tables)


def test_the_host_knows_the_rows_without_a_look_at_the_device():
    """On meta tensors a look raises: each step of a batch on a device would wait for the one before."""
    here, there = build(), build(device="meta")
    assert here.row_spans_on_cpu is here.row_spans and there.row_spans.is_meta
    assert torch.equal(there.row_spans_on_cpu, here.row_spans) and there.row_spans_on_cpu.dtype == torch.int32
    assert build(grids=[], text_lens=[], cond_lens=[], device="meta").row_spans_on_cpu.shape == (0, 2)


def test_a_mask_hides_keys_and_no_queries():
    layout = build(text_masks=[torch.tensor([True, False, True]), torch.zeros(4, dtype=torch.bool), None])
    assert layout.key_spans.tolist() == [
        [[0, 12], [13, 1], [15, 1]],
        [[12, 0], [0, 0], [0, 0]],
        [[12, 1], [20, 0], [0, 0]],
    ]
    assert torch.equal(layout.query_spans, build().query_spans)


def test_an_empty_batch_has_no_rows():
    layout = Layout.build([], [], [])
    assert layout.num_rows == 0 and layout.row_spans.shape == (0, 2) and layout.query_spans.shape == (0, 2, 2)


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"text_lens": [1, 2]}, "one entry a sample"),
        ({"cond_lens": []}, "one entry a sample"),
        ({"text_masks": [None]}, "one entry a sample"),
        ({"grids": [(1, 1, 1), (1, -1, 1), (1, 1, 1)]}, "must not be negative"),
        ({"grids": [(1, 1, 1), (1, 1), (1, 1, 1)]}, "must not be negative"),
        ({"text_lens": [1, -2, 3]}, "must not be negative"),
        ({"text_masks": [torch.ones(2, dtype=torch.bool), None, None]}, "text mask must be bool"),
        ({"text_masks": [torch.ones(3), None, None]}, "text mask must be bool"),
    ],
)
def test_what_does_not_fit_is_told(changes, rule):
    with pytest.raises(ValueError, match=rule):
        build(**changes)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_patches_are_those_of_the_convolution_and_come_back(patch):
    from dense_model import make_config

    config = make_config(patch=patch)
    grids = [(2, 3, 1), (2, 3, 1), (1, 2, 5)]
    sizes = [tuple(g * p for g, p in zip(grid, patch, strict=True)) for grid in grids]
    latents = [torch.randn(config.in_channels, *size) for size in sizes]
    layout = Layout.build(grids, [0] * 3, [0] * 3)
    assert [patch_grid(size, config) for size in sizes] == grids
    rows = patchify(torch.cat([x.flatten() for x in latents]), layout, config)
    weight = torch.randn(7, config.in_channels, *patch)
    want = [torch.nn.functional.conv3d(x[None], weight, stride=patch)[0].flatten(1).T for x in latents]
    torch.testing.assert_close(rows @ weight.flatten(1).T, torch.cat(want))
    channel_last = rows.unflatten(1, (config.in_channels, -1)).transpose(1, 2).flatten(1)
    assert torch.equal(unpatchify(channel_last, layout, config), torch.cat([x.flatten() for x in latents]))
    with pytest.raises(ValueError, match="latents must have"):
        patchify(torch.zeros(5000), layout, config)
