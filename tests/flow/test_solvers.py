"""Video solvers through flow_step: they land where they must, and UniPC is diffusers'."""

import pytest
import torch

from uvg_engine.flow import SigmaSchedule, solver_rows
from uvg_engine.flow.solvers import unipc_rows
from uvg_engine.ops import flow_step


def integrate(rows, sigmas, velocity, x):
    """x [N] through every row by flow_step, history kept as a sampler keeps it; `velocity(x, sigma)`."""
    spans, none = torch.tensor([[0, len(x)]], dtype=torch.int32), torch.tensor([[0, 0]], dtype=torch.int32)
    ids, zero, one = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    last = m1 = m2 = None
    for row, sigma in zip(rows, sigmas, strict=False):
        coefs = torch.tensor([row], dtype=x.dtype)
        v = velocity(x, sigma)
        x, last, m, _ = flow_step(x, v, None, one, coefs, last, m1, m2, spans, ids, ids, 0 * one, zero, zero, none)
        m1, m2 = m, m1
    return x


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_constant_velocity_lands_on_the_data(solver, steps, shift):
    gen = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 33, generator=gen, dtype=torch.float64)
    sigmas = SigmaSchedule(steps, shift).sigmas()
    got = integrate(solver_rows(solver, sigmas), sigmas, lambda x, s: noise - data, noise)
    torch.testing.assert_close(got, data, rtol=0, atol=1e-12)


def gaussian_velocity(x, sigma):
    """E[noise - data | x] for data ~ N(2, 0.25) and the exact flow's target; a curved field with a known end."""
    alpha, var = 1 - sigma, 0.25
    total = alpha**2 * var + sigma**2
    return -2 + (sigma - alpha * var) / total * (x - alpha * 2)


def test_orders_of_accuracy():
    """The exact flow map of a Gaussian is linear: noise n ends at 2 + n/2."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    error = {}
    for solver in ("euler", "unipc"):
        for steps in (20, 40):
            sigmas = SigmaSchedule(steps, 3.0).sigmas()
            end = integrate(solver_rows(solver, sigmas), sigmas, gaussian_velocity, noise)
            error[solver, steps] = float((end - 2 - noise / 2).abs().max())
    assert 1.7 < error["euler", 20] / error["euler", 40] < 2.5
    assert error["unipc", 20] / error["unipc", 40] > 3 and error["unipc", 20] < error["euler", 20] / 5


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_unipc_is_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
    )
    scheduler.set_timesteps(steps)
    sigmas = SigmaSchedule(steps, 3.0, end=1e-3, below_one=1e-6).sigmas()
    torch.testing.assert_close(torch.tensor(sigmas), scheduler.sigmas, rtol=0, atol=1e-7)
    assert [int(1000 * s) for s in sigmas[:-1]] == scheduler.timesteps.tolist()

    def velocity(x, sigma):
        return torch.sin(3 * x) + x * sigma - 0.5

    start = torch.linspace(-2, 2, 17, dtype=torch.float64)
    x = start.reshape(1, 17, 1, 1)  # its tensors have channels
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, sigmas[i]), timestep, x).prev_sample
    x = x.flatten()
    got = integrate(solver_rows("unipc", sigmas), sigmas, velocity, start)
    assert float((got - x).abs().max() / x.abs().max()) < 1e-5


def test_one_from_sigma_one_is_the_limit():
    """A first sigma of exactly 1 gives what diffusers' 1 - 1e-6 tends to."""
    levels = SigmaSchedule(6, 3.0).sigmas()
    near = (1 - 1e-9, *levels[1:])
    for a, b in zip(unipc_rows(levels), unipc_rows(near), strict=True):
        assert a == pytest.approx(b, abs=0.05)  # 1/r goes to zero only as 1/log
    assert all(torch.tensor(row).isfinite().all() for row in unipc_rows(levels))


@pytest.mark.parametrize("call, match", [
    (lambda: solver_rows("rk4", (1.0, 0.0)), "solver must be one of euler, unipc, got 'rk4'"),
    (lambda: solver_rows("euler", (1.0, 1.0, 0.0)), "sigmas must be two or more"),
    (lambda: solver_rows("unipc", (1.0,)), "sigmas must be two or more"),
    (lambda: solver_rows("unipc", (1.2, 0.0)), "sigmas must be two or more"),
    (lambda: unipc_rows((1.0, 0.5, 0.0), lower_order_final=False), "lower_order_final must be True"),
])  # fmt: skip
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
