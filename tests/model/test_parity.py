"""Against what the authors' own code returned (tests/data/parity_small.safetensors)."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from uvg_engine.flow import SigmaSchedule, model_time
from uvg_engine.model import UniViGU, UniViGUConfig, load_published, published_config

GOLDEN = Path(__file__).parents[1] / "data" / "parity_small.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        meta = file.metadata()
    config = UniViGUConfig(**json.loads(meta["config"]), round_temb=meta["round_temb"] == "True")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return load_published(UniViGU(config), state).eval(), state, tensors


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
def test_velocity_and_logits(golden):
    model, _, t = golden
    args = [t[f"in.{name}"] for name in ("x_v", "x_t", "time_v", "time_t", "cond_t", "mask")]
    velocity, logits = model(*args)
    mask = t["in.mask"]
    assert relative(velocity, t["out.velocity"]) <= 1e-5
    assert relative(logits[mask], t["out.logits"][mask]) <= 1e-5


@torch.no_grad()
def test_trajectory(golden):
    """Six Euler steps with CFG 5 and shift 3; the text stands still at time 0 and both branches see it."""
    model, _, t = golden
    sigmas = SigmaSchedule(6, shift=3.0).sigmas()
    torch.testing.assert_close(torch.tensor(sigmas[:-1]), t["out.sigmas"], rtol=1e-6, atol=0)
    x, zero = t["in.x_v"], torch.zeros(2)
    for sigma, after in pairwise(sigmas):
        time = torch.full((2,), model_time(sigma))
        v_c, v_u = (
            model(x, t["in.x_t"], time, zero, cond, t["in.mask"])[0] for cond in (t["in.cond_t"], t["in.null_cond"])
        )
        x = x + (v_u + 5.0 * (v_c - v_u)) * (after - sigma)
    assert relative(x, t["out.t2v_6steps_cfg5_shift3"]) <= 1e-5


def test_config_is_read_from_the_shapes(golden):
    model, state, _ = golden
    found = published_config(state)
    assert found.round_temb and found.round_time, "the quirks are as published"
    assert published_config(state, round_temb=False, round_time=False) == model.config


def test_state_dict_has_the_published_keys_in_the_published_shapes(golden):
    model, state, _ = golden
    ours = model.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in state.items()}
    assert all(torch.equal(ours[key], state[key]) for key in state)
