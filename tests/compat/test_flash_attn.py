"""flash-attn's calls: the same numbers as attention written out, samples kept apart, and refusals by name."""

import gc
import inspect
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from uvg_engine import backends
from uvg_engine.backends import native, plans
from uvg_engine.compat import flash_attn as ours
from uvg_engine.ops import _plans, _registry

planned = pytest.mark.skipif(not _plans._begin(), reason="no native core, or a torch without DLPack's functions")
DENSE = ("q", "k", "v")
COMMON = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def written_out(q, k, v, scale=None):
    """Attention of [B, L, N, H] with as many key heads as query heads, and its lse [B, N, L]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("blnh,bsnh->bnls", q, k) * scale
    return torch.einsum("bnls,bsnh->blnh", scores.softmax(-1), v), scores.logsumexp(-1)


def test_signatures_are_flash_attns():
    """Names, order and defaults as published for flash-attn 2.8."""

    def signature(function):
        return {n: p.default for n, p in inspect.signature(function).parameters.items()}

    none = inspect.Parameter.empty
    varlen = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    expected = {
        "flash_attn_func": dict.fromkeys(DENSE, none) | COMMON,
        "flash_attn_varlen_func": dict.fromkeys(varlen, none) | COMMON | {"block_table": None},
        "flash_attn_qkvpacked_func": {"qkv": none} | COMMON,
        "flash_attn_kvpacked_func": {"q": none, "kv": none} | COMMON,
        "flash_attn_varlen_qkvpacked_func": dict.fromkeys(("qkv", "cu_seqlens", "max_seqlen"), none) | COMMON,
        "flash_attn_varlen_kvpacked_func": dict.fromkeys(("q", "kv", *varlen[3:]), none) | COMMON,
    }
    assert expected.keys() == set(ours.__all__)
    for name, parameters in expected.items():
        assert list(signature(getattr(ours, name)).items()) == list(parameters.items())


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_dense_with_gradients(scale, key_heads):
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, key_heads, 8, seed=1), normal(2, 7, key_heads, 8, seed=2)
    out, lse, dropped = ours.flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)
    many = [x.repeat_interleave(4 // key_heads, 2) for x in (k, v)]
    want, want_lse = written_out(q, *many, scale)
    assert out.shape == (2, 5, 4, 8) and dropped.shape == (0,) and dropped.dtype == q.dtype  # as of 2.7
    torch.testing.assert_close((out, lse), (want, want_lse))
    dout = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(want, (q, k, v), dout))
    assert torch.equal(ours.flash_attn_func(q, k, v, softmax_scale=scale), out)


def test_packed_samples_share_key_heads_and_stay_apart():
    """A sample of grouped heads has the bits that it has alone, and those of attention written out."""
    q, k, v = normal(8, 4, 8), normal(9, 2, 8, seed=1), normal(9, 2, 8, seed=2)
    bounds_q, bounds_k = torch.tensor([0, 3, 3, 8]).int(), torch.tensor([0, 4, 9, 9]).int()
    out, lse, _ = ours.flash_attn_varlen_func(q, k, v, bounds_q, bounds_k, 5, 5, return_attn_probs=True)
    alone = ours.flash_attn_func(q[None, :3], k[None, :4], v[None, :4])
    assert out.shape == q.shape and out.is_contiguous() and torch.equal(out[None, :3], alone)
    assert not out[3:].any() and lse.shape == (4, 8) and torch.isneginf(lse[:, 3:]).all()  # the third has no keys
    one = (x[:, :1] for x in (k, v))
    results = ours.flash_attn_varlen_func(q, *one, bounds_q, bounds_k, 5, 5, return_attn_probs=True)
    assert all(result.is_contiguous() for result in results)
    want, want_lse = written_out(
        *(x[None] for x in (q[:3], k[:4].repeat_interleave(2, 1), v[:4].repeat_interleave(2, 1)))
    )
    torch.testing.assert_close((out[None, :3], lse[None, :, :3]), (want, want_lse))


def test_it_stands_in_for_the_package(monkeypatch):
    """As the quickstart tells."""
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, ours)
    lines = (
        "from flash_attn import flash_attn_func as a; from flash_attn.flash_attn_interface import flash_attn_func as b"
    )
    found = {}
    exec(lines, found)
    assert found["a"] is found["b"] is ours.flash_attn_func


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_served_on_the_cpu(dtype):
    q, k, v = (normal(2, 9, 2, 16, seed=seed).to(dtype) for seed in range(3))
    out = ours.flash_attn_func(q, k, v)
    want, _ = written_out(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=0, atol=4e-3 if dtype == torch.float16 else 1e-12)


def test_packed_qkv_is_its_parts():
    qkv = normal(2, 6, 3, 2, 8)
    out = ours.flash_attn_qkvpacked_func(qkv, softmax_scale=0.2)
    assert torch.equal(out, ours.flash_attn_func(*qkv.unbind(2), softmax_scale=0.2))
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    kv = ours.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], softmax_scale=0.2)
    assert torch.equal(kv, out)

    rows, bounds = qkv.flatten(0, 1), torch.tensor([0, 5, 12]).int()
    q, k, v = rows.unbind(1)
    want = ours.flash_attn_varlen_func(q, k, v, bounds, bounds, 7, 7, softmax_scale=0.2, return_attn_probs=True)
    more = {"softmax_scale": 0.2, "return_attn_probs": True}
    for got in (
        ours.flash_attn_varlen_qkvpacked_func(rows, bounds, 7, **more),
        ours.flash_attn_varlen_kvpacked_func(q, rows[:, 1:], bounds, bounds, 7, 7, **more),
    ):
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_variable_lengths_are_samples_of_their_own():
    q, k, v = normal(8, 2, 8), normal(9, 2, 8, seed=1), normal(9, 2, 8, seed=2)
    bounds_q, bounds_k = torch.tensor([0, 3, 3, 8]).int(), torch.tensor([0, 4, 9, 9]).int()
    out, lse, _ = ours.flash_attn_varlen_func(q, k, v, bounds_q, bounds_k, 5, 5, return_attn_probs=True)
    alone = ours.flash_attn_func(q[None, :3], k[None, :4], v[None, :4])
    torch.testing.assert_close(out[:3], alone[0])
    assert not out[3:].any() and lse.shape == (2, 8) and torch.isneginf(lse[:, 3:]).all()  # the third has no keys


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("dropout_p", 0.1, "dropout_p must be 0.0: others are not served, got 0.1"),
        ("causal", True, "causal must be False"),
        ("window_size", (3, 0), r"window_size must be \(-1, -1\)"),
        ("softcap", 5.0, "softcap must be 0.0"),
        ("alibi_slopes", torch.ones(2), "alibi_slopes must be None"),
    ],
)
def test_what_is_not_served_is_refused_by_name(name, value, match):
    x, bounds = torch.ones(1, 3, 2, 8), torch.tensor([0, 3]).int()
    calls = [
        lambda **more: ours.flash_attn_func(x, x, x, **more),
        lambda **more: ours.flash_attn_qkvpacked_func(torch.stack([x, x, x], 2), **more),
        lambda **more: ours.flash_attn_kvpacked_func(x, torch.stack([x, x], 2), **more),
        lambda **more: ours.flash_attn_varlen_qkvpacked_func(torch.stack([x[0], x[0], x[0]], 1), bounds, 3, **more),
        lambda **more: ours.flash_attn_varlen_kvpacked_func(
            x[0], torch.stack([x[0], x[0]], 1), bounds, bounds, 3, 3, **more
        ),
        lambda **more: ours.flash_attn_varlen_func(x[0], x[0], x[0], bounds, bounds, 3, 3, **more),
    ]
    for call in calls:
        call()
        with pytest.raises(ValueError, match=match):
            call(**{name: value})


def test_shapes_that_do_not_fit_are_told():
    x, bounds = torch.ones(2, 3, 4, 8), torch.tensor([0, 3]).int()
    with pytest.raises(ValueError, match=r"q must be \(B, L, N, H\), got \(3, 4, 8\)"):
        ours.flash_attn_func(x[0], x, x)
    with pytest.raises(ValueError, match="k must have q's B = 2"):
        ours.flash_attn_func(x, x[:1], x[:1])
    with pytest.raises(ValueError, match="heads of q must be a multiple of k's 3, got 4"):
        ours.flash_attn_func(x, x[:, :, :3], x[:, :, :3])
    with pytest.raises(ValueError, match="heads of q must be a multiple of k's 4, got 0"):
        ours.flash_attn_func(x[:, :, :0], x, x)
    with pytest.raises(ValueError, match=r"v must have k's shape \(2, 3, 4, 8\), got \(2, 3, 2, 8\)"):
        ours.flash_attn_func(x, x, x[:, :, :2])
    with pytest.raises(ValueError, match=r"v must have k's shape \(3, 2, 8\), got \(3, 4, 8\)"):
        ours.flash_attn_varlen_func(x[0], x[0, :, :2], x[0], bounds, bounds, 3, 3)
    with pytest.raises(ValueError, match=r"qkv must be \(B, L, 3, N, H\)"):
        ours.flash_attn_qkvpacked_func(x)
    with pytest.raises(ValueError, match=r"kv must be \(B, S, 2, M, H\), got \(2, 3, 4, 8\)"):
        ours.flash_attn_kvpacked_func(x, x)
    with pytest.raises(ValueError, match=r"qkv must be \(T, 3, N, H\), got \(3, 4, 8\)"):
        ours.flash_attn_varlen_qkvpacked_func(x[0], bounds, 3)
    with pytest.raises(ValueError, match=r"kv must be \(U, 2, M, H\), got \(2, 3, 4, 8\)"):
        ours.flash_attn_varlen_kvpacked_func(x[0], x, bounds, bounds, 3, 3)
    with pytest.raises(ValueError, match="cu_seqlens_k must be an int32"):
        ours.flash_attn_varlen_func(x[0], x[0], x[0], bounds, bounds.long(), 3, 3)
    with pytest.raises(ValueError, match="block_table must be None"):
        ours.flash_attn_varlen_func(x[0], x[0], x[0], bounds, bounds, 3, 3, block_table=bounds)


@pytest.mark.parametrize("wrong", [[1, 3, 9], [-1, 3, 9], [0, 5, 3], [0, 3, 10]])
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_bounds_rise_from_0_and_end_within_the_rows(which, wrong):
    x, bounds = torch.ones(9, 2, 8), torch.tensor([0, 3, 9]).int()
    given = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds} | {which: torch.tensor(wrong).int()}
    rule = rf"{which} must begin with 0, not fall, and end within the 9 rows, got \[{wrong[0]}, "
    with pytest.raises(ValueError, match=rule):
        ours.flash_attn_varlen_func(x, x, x, max_seqlen_q=6, max_seqlen_k=6, **given)


@pytest.mark.parametrize(
    "looks_on",
    [
        lambda: torch.device("cpu"),
        lambda: torch.device("meta"),
        BaseTorchFunctionMode,
        lambda: FlopCounterMode(display=False),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        torch.autograd.forward_ad.dual_level,
    ],
)
def test_bounds_are_checked_whoever_looks_on(looks_on):
    x, bounds = torch.ones(9, 2, 8), torch.tensor([1, 3, 9]).int()
    with pytest.raises(ValueError, match="cu_seqlens_q must begin with 0"), looks_on():
        ours.flash_attn_varlen_func(x, x, x, bounds, bounds, 6, 6)


def test_bounds_without_values_are_not_read():
    x, bounds = torch.ones(9, 2, 8), torch.tensor([0, 3, 9]).int()

    def attend(bounds):
        return ours.flash_attn_varlen_func(x, x, x, bounds, bounds, 6, 6)

    many = torch.vmap(attend)(torch.stack([bounds, bounds]))
    assert torch.equal(many, attend(bounds).expand_as(many))


@pytest.mark.parametrize("capturing", [False, True])
def test_spans_of_a_captured_call_are_not_kept(capturing, monkeypatch):
    """A CUDA graph gives its memory values only when it is replayed: a later call would read what lies there."""
    asked = []
    for name in ("_kept_even_spans", "_new_even_spans"):
        monkeypatch.setattr(ours, name, lambda *sizes, name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    ours._even_spans(2, 3, x)
    assert asked == ["_new_even_spans" if capturing else "_kept_even_spans"]


@pytest.fixture
def no_plans():
    """Nothing is planned yet."""
    for planner in _plans.planners.values():
        native.core().plans_forget(planner)


@planned
@pytest.mark.parametrize("samples", [1, 2])
def test_a_dense_call_is_by_a_plan(samples, no_plans, monkeypatch):
    """One without Python's part in it, spans included, which the plan keeps; with a gradient one node of autograd."""
    given = [[normal(samples, rows, 4, 8, seed=10 * i + rows) for rows in (5, 7, 7)] for i in range(3)]
    want = ours.flash_attn_func(*given[0])
    for tensors in given:
        with torch.no_grad():
            ours.flash_attn_func(*tensors)
    ours._kept_even_spans.cache_clear()
    gc.collect()
    monkeypatch.setattr(ours, "_group", lambda *args: pytest.fail("the long way"))
    with torch.no_grad():
        out = ours.flash_attn_func(*given[0])
    assert torch.equal(out, want) and out.is_contiguous() and not out.requires_grad


@planned
def test_calls_with_a_window_and_of_packed_samples_are_by_plans(no_plans, monkeypatch):
    qkv = normal(2, 5, 3, 4, 8).detach()
    calls = (
        lambda: ours.flash_attn_qkvpacked_func(qkv),
        lambda: ours.flash_attn_func(*qkv.unbind(2), window_size=(-1, -1)),
    )
    want = [call() for call in calls for _ in range(3)][::3]
    monkeypatch.setattr(ours, "_group", lambda *args: pytest.fail("the long way"))
    assert all(torch.equal(call(), out) for call, out in zip(calls, want, strict=True))
    with pytest.raises(ValueError, match="window_size must be"):
        ours.flash_attn_func(*qkv.unbind(2), window_size=(-1, 0))


@pytest.mark.parametrize("keep", [True, False])
def test_a_result_with_a_gradient_may_be_written_to(keep):
    """In the first calls, which make the plans, and in later ones."""
    q, k, v = (normal(1, 5, 4, 8, seed=i) for i in range(3))
    with plans.kept(keep):
        want = ours.flash_attn_func(q, k, v).detach()
        for _ in range(5):
            out = ours.flash_attn_func(q, k, v)
            out.add_(1)
            torch.testing.assert_close(out.detach(), want + 1)


@planned
@pytest.mark.parametrize("samples", [1, 2])
def test_a_dense_gradient_is_by_plans(samples, no_plans, monkeypatch):
    q, k, v = (normal(samples, rows, 4, 8, seed=rows + i) for i, rows in enumerate((5, 7, 7)))
    dout = torch.randn(q.shape)

    def gradients(given):
        return torch.autograd.grad(ours.flash_attn_func(*given), given, dout)

    want = torch.autograd.grad(written_out(q, k, v)[0], (q, k, v), dout)
    for _ in range(3):
        got = gradients((q, k, v))
    torch.testing.assert_close(got, want)
    monkeypatch.setattr(_registry, "alone", lambda args: pytest.fail("the long way"))
    monkeypatch.setattr(ours, "_group", lambda *args: pytest.fail("the long way"))
    others = [(x * 0.5).detach().requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(gradients(others), torch.autograd.grad(written_out(*others)[0], others, dout))
    out = ours.flash_attn_func(q, k, v)
    assert len(out.grad_fn.next_functions) >= 3 and all(
        type(node).__name__ == "AccumulateGrad" for node, _ in out.grad_fn.next_functions if node is not None
    )


@pytest.mark.parametrize("samples", [1, 2])
def test_dense_gradients_of_views_and_single_inputs(samples):
    """Parts of one projection, and only some of q, k, v with a gradient."""
    qkv = normal(samples, 6, 3, 4, 8)
    dout = torch.randn(samples, 6, 4, 8)
    want = torch.autograd.grad(written_out(*qkv.unbind(2))[0], qkv, dout)
    for _ in range(4):
        torch.testing.assert_close(torch.autograd.grad(ours.flash_attn_qkvpacked_func(qkv), qkv, dout), want)
    q, k, v = (x.detach() for x in qkv.unbind(2))
    for one in range(3):
        given = [x.clone().requires_grad_(i == one) for i, x in enumerate((q, k, v))]
        wanted = torch.autograd.grad(written_out(*given)[0], given[one], dout)
        for _ in range(3):
            torch.testing.assert_close(torch.autograd.grad(ours.flash_attn_func(*given), given[one], dout), wanted)


def test_a_dense_gradient_stays_with_the_backend_that_was_forced():
    q, k, v = (normal(1, 5, 4, 8, seed=i) for i in range(3))
    seen = []
    select = backends.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "select", lambda op, *rest, **more: seen.append(select(op, *rest, **more)) or seen[-1])
        with backends.force("reference"):
            out = ours.flash_attn_func(q, k, v)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert [name for name, _ in seen] == ["reference", "reference"]
