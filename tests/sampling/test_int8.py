"""The engine with its products in bytes: near the full one, the same bits in any company, clear refusals."""

import pytest
import torch
from tiny import alone, bits, make_engine, make_model, mixed_requests

from uvg_engine import Engine
from uvg_engine.model import Layout


@pytest.fixture(scope="module")
def engine():
    model = make_model()
    model.int8 = True
    return make_engine(model)


def test_nothing_is_in_bytes_unless_asked_for():
    assert not make_model().int8 and not Engine.from_pretrained("digits").model.int8
    assert Engine.from_pretrained("digits", precision="int8").model.int8


def test_same_bits_alone_in_a_batch_and_with_more_threads(engine):
    requests, threads = mixed_requests(), torch.get_num_threads()
    together = [bits(result) for result in engine.run(requests)]
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert [bits(alone(engine, request)) for request in requests] == together
    finally:
        torch.set_num_threads(threads)


def velocity(model):
    g = torch.Generator().manual_seed(0)
    grid, config = (2, 4, 4), model.config
    layout = Layout.build([grid], [5], [3])
    latents, time = torch.randn(config.in_channels * config.patch_volume * 32, generator=g), torch.full((1,), 500.0)
    condition = model.condition_kv(torch.randn(3, config.text_dim, generator=g), [3])
    return model.packed(latents, torch.arange(5), layout, time, time, condition).velocity


@torch.no_grad()
def test_near_the_full_model(engine):
    """Each of the blocks' products errs by about a percent, and does err: it was in bytes."""
    full, got = velocity(make_model()), velocity(engine.model)
    assert 1e-3 < float((got - full).norm() / full.norm()) < 0.05


def test_training_is_refused(engine):
    with pytest.raises(ValueError, match="linear_int8 has no gradient"):
        velocity(engine.model)


def test_refusals():
    with pytest.raises(ValueError, match="precision must be one of full, int8, got int4"):
        Engine.from_pretrained("digits", precision="int4")
    with pytest.raises(ValueError, match='precision must be "full" on a device other than the CPU, got int8'):
        Engine.from_pretrained("digits", device="cuda", precision="int8")
