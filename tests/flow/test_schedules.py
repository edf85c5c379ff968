"""Noise levels, kappa and the jump probability; the job plans made of them."""

import math

import pytest
import torch

from uvg_engine.flow import (
    HOLD,
    FlowSettings,
    Kappa,
    SigmaSchedule,
    model_time,
    plan,
    progress_probability,
    solver_rows,
)


def test_sigmas_with_shift():
    assert SigmaSchedule(6, 3.0).sigmas() == pytest.approx((1, 15 / 16, 6 / 7, 3 / 4, 3 / 5, 3 / 8, 0))
    assert SigmaSchedule(4).sigmas() == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert SigmaSchedule(1, 3.0).sigmas() == (1.0, 0.0)
    for shift in (1e-6, 0.3, 3.0, 1e4):  # ends where it begins, exactly
        levels = SigmaSchedule(9, shift).sigmas()
        assert (levels[0], levels[-1]) == (1.0, 0.0) and list(levels) == sorted(set(levels), reverse=True)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_rate_is_the_derivative_and_finite_at_one(power):
    kappa, t = Kappa(power), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kappa(t).sum(), t)
    torch.testing.assert_close(kappa.rate(t), slope / (1 - kappa(t)))
    for dtype in (torch.float32, torch.float64):
        ends = kappa.rate(torch.tensor([0.0, 1.0], dtype=dtype))
        assert bool(ends.isfinite().all()) and ends[0] == (1.0 if power == 1 else 0.0) and ends[1] > 1e5


def test_jump_probability():
    kappa = Kappa()
    assert kappa.jump_probability(0.5, 0.6) == pytest.approx(1 - math.exp(-0.1 / 0.5))
    assert kappa.jump_probability(0.5, 0.6, "exact") == pytest.approx(0.2)
    assert Kappa(2.0).jump_probability(0.0, 0.1) == 0.0  # the rate of t^2 is zero at the source
    assert Kappa(2.0).jump_probability(0.0, 0.1, "exact") == pytest.approx(0.01)
    for rule in ("euler", "exact"):
        assert kappa.jump_probability(0.98, 1.0, rule) == 1.0
        stay = 1.0  # exact: those left at the source after any steps are 1 - kappa
        for i in range(7):
            stay *= 1 - Kappa(2.0).jump_probability(i / 8, (i + 1) / 8, rule)
        if rule == "exact":
            assert stay == pytest.approx(1 - (7 / 8) ** 2)
    assert [progress_probability(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert progress_probability(0, 1) == 1


def test_model_times_and_their_quirks():
    assert model_time(0.9375) == 937.5
    assert model_time(0.9375, integer=True) == 937.0
    assert model_time(0.9375, round_bf16=True) == 936.0


def test_generate_and_caption_plans():
    job = plan("generate", FlowSettings(steps=5))
    assert job.guidance == 5.0 and not job.null_condition and job.head_evaluations == 0
    for i, step in enumerate(job.steps):
        assert (step.index, step.text_time, step.jump_prob, step.text_moves) == (i, 0.0, 0.0, False)
        assert step.video_time == 1000 * SigmaSchedule(5, 3.0).sigmas()[i]
    job = plan("caption", FlowSettings(steps=50))
    assert job.guidance == 1.0 and job.null_condition
    assert all(s.coefs == HOLD and s.video_time == 0 and not s.video_moves for s in job.steps)
    assert job.steps[0].text_time == 1000 and job.steps[-1].jump_prob == 1 and not job.steps[-1].argmax
    assert job.head_evaluations == pytest.approx(4.217, abs=1e-3)  # DESIGN: 4.2 of 50


@pytest.mark.parametrize("rule", ["euler", "exact", "progress"])
def test_joint_plan(rule):
    job = plan("joint", FlowSettings(steps=6, text_rule=rule, round_times=True, solver="unipc"))
    assert len(job.steps) == (7 if rule == "progress" else 6)
    assert all(s.video_time == s.text_time for s in job.steps)
    assert [s.coefs for s in job.steps[:6]] == list(solver_rows("unipc", SigmaSchedule(6, 3.0).sigmas()))
    assert job.steps[-1].jump_prob == 1
    if rule == "progress":
        final = job.steps[-1]
        assert final.argmax and final.text_time == 0 and final.coefs == HOLD and not final.video_moves
        assert [s.jump_prob for s in job.steps] == [0, 0.2, 0.4, 0.6, 0.8, 1, 1]
    assert job.steps[1].video_time == 936.0


@pytest.mark.parametrize("call, match", [
    (lambda: FlowSettings(steps=0), "steps must be an integer of at least 1, got 0"),
    (lambda: FlowSettings(steps=2.5), "steps must be an integer"),
    (lambda: FlowSettings(steps=True), "steps must be an integer"),
    (lambda: FlowSettings(steps=10**9), "steps must be at most 100000, got 1000000000"),
    (lambda: FlowSettings(shift=0.0), "shift must be finite and positive, got 0"),
    (lambda: plan("generate", FlowSettings(shift=1e-300)), "steps and shift must leave the noise levels apart"),
    (lambda: plan("caption", FlowSettings(caption_shift=1e30)), "must leave the noise levels apart, got 50 and 1e"),
    (lambda: FlowSettings(round_times="no"), "round_times must be true or false, got .no."),
    (lambda: FlowSettings(solver="heun"), "solver must be one of euler, unipc, got 'heun'"),
    (lambda: FlowSettings(text_rule="x"), "text_rule must be one of"),
    (lambda: FlowSettings(guidance=float("nan")), "guidance must be finite"),
    (lambda: FlowSettings(kappa_power=0.5), "power must be finite and at least 1, got 0.5"),
    (lambda: FlowSettings(sigma_end=1.0), r"end must be in \[0, 1\)"),
    (lambda: plan("dance"), "kind must be one of generate, caption, joint, got 'dance'"),
    (lambda: Kappa().jump_probability(0.5, 0.5), "t and t_next must be"),
    (lambda: Kappa().jump_probability(0.1, 0.5, "progress"), "rule must be euler or exact"),
    (lambda: progress_probability(5, 5), "index must be in"),
])  # fmt: skip
def test_errors_name_rule_and_value(call, match):
    with pytest.raises(ValueError, match=match):
        call()
