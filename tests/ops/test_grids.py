"""A grid has 65,535 blocks along its second axis: calls that need more are refused, those that need as many are not."""

import cuda_simulator
import pytest
import torch

from uvg_engine import backends
from uvg_engine.backends.cuda import flash_attention

MOST = 65535
SPANS = torch.tensor([[[0, 1]]], dtype=torch.int32)


def heads(count):
    return [torch.zeros(1, count, 8, dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize(
    "name, op, rest",
    [
        ("cuda", "flash_attention", [SPANS, SPANS, 0.5]),
        ("triton", "flash_attention", [SPANS, SPANS, 0.5]),
        ("triton", "window_attention", [0.5]),
    ],
)
def test_more_heads_than_a_grid_has_are_refused(name, op, rest):
    kernel = backends.table(name)[op]
    assert kernel.refuses(*heads(MOST + 1), *rest) == "65536 heads; up to 65535"
    assert "heads" not in (kernel.refuses(*heads(MOST), *rest) or "")


def test_a_call_of_so_many_heads_goes_to_another_backend():
    q, k, v = heads(MOST + 1)
    with cuda_simulator.running():
        call = q, k, v, SPANS, SPANS, 0.5
        assert backends.explain("flash_attention", *call)["cuda"] == "65536 heads; up to 65535"
        assert backends.select("flash_attention", call)[0] != "cuda"
        with backends.force("cuda"), pytest.raises(backends.BackendRefused, match="65536 heads; up to 65535"):
            backends.select("flash_attention", call)


@pytest.mark.skipif(cuda_simulator.module() is None, reason="the simulator was not built")
def test_the_grid_itself_ends_there():
    """So the refusal is neither late nor early."""
    simulator = cuda_simulator.module()
    simulator.set_last_block_only(True)
    try:
        with cuda_simulator.running():
            out, lse = flash_attention.forward(*heads(MOST), SPANS, SPANS, 0.5)
            assert lse[-1, 0] == 0 and not out.any()
            flash_attention.backward(out, out, lse, *heads(MOST), SPANS, SPANS, 0.5)
            with pytest.raises(ValueError, match="a grid must have at most"):
                flash_attention.forward(*heads(MOST + 1), SPANS, SPANS, 0.5)
    finally:
        simulator.set_last_block_only(False)
