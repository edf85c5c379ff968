"""What a block takes of memory, forward and backward: all that asks for it, torch, the kernels' scratch, gradients."""

import sys

import pytest
import torch

from bench.memory import alone, extra_memory
from uvg_engine import backends
from uvg_engine.backends import native
from uvg_engine.model import Layout, named_config
from uvg_engine.model.blocks import Block, Rows
from uvg_engine.model.embeddings import inverse_frequencies, rope_table

GRID, TEXT, CONDITION = (4, 16, 14), 128, 64
WIDTH, HIDDEN, HEAD = 256, 1024, 64
REACHED = 21.5  # MB, AVX2; four processes took 21.3 to 21.5


def needed(threads: int) -> float:
    """MB at the peak of a block's forward and backward in bf16, the least of three."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    block = Block(named_config("digits", heads=WIDTH // HEAD, head_dim=HEAD, ffn_dim=HIDDEN)).to(torch.bfloat16)
    layout = Layout.build([GRID], [TEXT], [CONDITION])
    table = rope_table(HEAD, TEXT, inverse_frequencies(HEAD))
    rows = Rows(layout, table, torch.randn(2, 6, WIDTH), torch.bfloat16, None)
    h = torch.randn(GRID[0] * GRID[1] * GRID[2] + TEXT, WIDTH, requires_grad=True)
    condition = torch.randn(CONDITION, WIDTH, dtype=torch.bfloat16)

    def call() -> None:
        with backends.force("cpu"):
            out = block(h, rows, block.condition_kv(condition, torch.bfloat16, None))
            torch.autograd.grad(out, (h, *block.parameters()), torch.ones_like(out))

    return min(extra_memory(call) for _ in range(3))


@pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not()))
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
def test_a_block_takes_no_more_than_it_did():
    """One tensor of hidden values more is 2.1 MB."""
    assert alone("tests.model.test_block_memory", "needed", 1) < 1.05 * REACHED
