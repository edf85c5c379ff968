"""How flash-attn 2 and 3 and cuDNN are called: libraries that compute by the reference and take just what the real ones
take stand in for them, on the CPU."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from uvg_engine.backends import cudnn, flash_attn, flash_attn_3, samples
from uvg_engine.compat import flash_attn as compat
from uvg_engine.reference import flash_attention as reference

N, H, SCALE = 2, 8, 0.3


def table(*per_sample):
    most = max((len(sample) for sample in per_sample), default=1)
    rows = [[*sample, *[(0, 0)] * (most - len(sample))] for sample in per_sample]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), most, 2)


ONE = {  # query rows, key rows, query spans, key spans
    "whole": (7, 9, table([(0, 7)]), table([(0, 9)])),
    "joint": (7, 7, table([(0, 4), (4, 3)]), table([(0, 4), (4, 3)])),
    "apart": (9, 11, table([(0, 3), (6, 2)]), table([(1, 2), (5, 5)])),
    "no-keys": (4, 4, table([(0, 4)]), table([(0, 0)])),
    "one-query": (3, 5, table([(1, 1)]), table([(0, 5)])),
    "one-key": (4, 3, table([(0, 4)]), table([(2, 1)])),
    "one-of-each": (1, 1, table([(0, 1)]), table([(0, 1)])),
}
MANY = {
    "tiled": (9, 11, table([(0, 4)], [(4, 5)]), table([(0, 1)], [(1, 10)])),
    "modality-major": (10, 10, *[table([(0, 3), (7, 1)], [(3, 4), (8, 2)])] * 2),
    "shared-keys": (6, 8, table([(0, 2)], [(2, 3)]), table([(0, 5)], [(2, 6)])),
    "some-empty": (9, 6, table([(0, 2)], [(2, 3)], [(0, 0)], [(6, 2)]), table([(0, 2)], [(0, 0)], [(2, 2)], [(4, 2)])),
    "none": (3, 3, table(), table()),
}


def bounds_as_spans(bounds, count, longest):
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and type(longest) is int
    lengths = bounds.diff()
    assert bounds[0] == 0 and bounds[-1] == count and lengths.min() > 0 and lengths.max() == longest
    return torch.stack([bounds[:-1], lengths], 1)[:, None]


def packed_args(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    assert all(x.is_contiguous() for x in (q, k, v))
    spans_q = bounds_as_spans(cu_seqlens_q, len(q), max_seqlen_q)
    return q, k, v, spans_q, bounds_as_spans(cu_seqlens_k, len(k), max_seqlen_k)


def fill(grads, values):
    for grad, value in zip(grads, values, strict=True):
        assert grad.is_contiguous()
        grad.copy_(value)


def flash_attn_2_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash_attn_varlen_func of flash-attn 2.8."""
    assert return_attn_probs and not causal and not dropout_p and not softcap and window_size == (-1, -1)
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return (*reference.forward(*packed_args(q, k, v, *bounds), softmax_scale), None)


def flash_attn_2_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    """_flash_attn_varlen_backward of flash-attn 2.8, which cuts dq's sum by multiprocessors / (samples * heads)."""
    assert len(cu_seqlens_q) == 2, "dq's bits would depend on how many samples there are"
    assert deterministic and not causal and not dropout_p and not softcap and alibi_slopes is None
    assert window_size_left == window_size_right == -1
    args = packed_args(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    fill((dq, dk, dv), reference.backward(dout, out, softmax_lse, *args, softmax_scale))


def flash_attn_3_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
):
    """flash_attn_varlen_func of flash-attn 3, by its names; further ones have their defaults."""
    args = packed_args(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    results = reference.forward(*args, softmax_scale)
    return results if return_attn_probs else results[0]


def flash_attn_3_early_forward(q, k, v, *bounds, softmax_scale=None, causal=False):
    """Early releases give the lse always, and more behind it."""
    return (*reference.forward(*packed_args(q, k, v, *bounds), softmax_scale), None, None)


def flash_attn_3_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q,
    cu_seqlens_k,
    sequed_q,
    sequed_k,
    max_seqlen_q,
    max_seqlen_k,
    dq,
    dk,
    dv,
    softmax_scale,
    is_causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    """_flash_attn_backward of flash-attn 3."""
    assert deterministic and sequed_q is None and sequed_k is None
    args = packed_args(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    fill((dq, dk, dv), reference.backward(dout, out, softmax_lse, *args, softmax_scale))


def dense_args(q, k, v):
    """One sample [1, N, L, H] as rows and spans."""
    assert len(q) == len(k) == len(v) == 1
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    return (*rows, *(table([(0, len(x))]) for x in rows[:2]))


def cudnn_forward(query, key, value, attn_bias, compute_log_sumexp, *, scale):
    """torch asks it for no attention of one query or one key: "does not support sequence length 1" (PR 138531)."""
    assert attn_bias is None and compute_log_sumexp and min(query.shape[2], key.shape[2]) > 1
    out, lse = reference.forward(*dense_args(query, key, value), scale)
    return (out.transpose(0, 1)[None], lse[None, ..., None], None, None, 0, 0, *torch.zeros(2, 1), None)


@pytest.fixture
def libraries(monkeypatch):
    two = SimpleNamespace(
        flash_attn_varlen_func=flash_attn_2_forward, _flash_attn_varlen_backward=flash_attn_2_backward
    )
    three = SimpleNamespace(flash_attn_varlen_func=flash_attn_3_forward, _flash_attn_backward=flash_attn_3_backward)
    monkeypatch.setattr(flash_attn, "_package", lambda: (two, None))
    monkeypatch.setattr(flash_attn_3, "_package", lambda: (three, None))
    monkeypatch.setattr(cudnn, "_forward", cudnn_forward)
    flash_attn_3._asked_for_lse.cache_clear()
    yield SimpleNamespace(two=two, three=three)
    flash_attn_3._asked_for_lse.cache_clear()


def inputs(num_q, num_k):
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(num_q, N, H, generator=g, dtype=torch.float32) for _ in range(2))
    k, v = (torch.randn(num_k, N, H, generator=g) for _ in range(2))
    return q, k, v, dout


RUNS = [(library, case) for library in (flash_attn, flash_attn_3) for case in (ONE | MANY).values()]
RUNS += [(cudnn, case) for case in (ONE | MANY).values()]
IDS = [f"{lib.__name__.rpartition('.')[2]}-{name}" for lib in (flash_attn, flash_attn_3) for name in ONE | MANY]
IDS += [f"cudnn-{name}" for name in ONE | MANY]


@pytest.mark.parametrize("library, case", RUNS, ids=IDS)
def test_values_are_those_of_the_reference(libraries, library, case):
    num_q, num_k, q_spans, k_spans = case
    q, k, v, dout = inputs(num_q, num_k)
    kernel, args = library.TABLE["flash_attention"], (q, k, v, q_spans, k_spans, SCALE)
    out, lse = kernel.forward(*args)
    for got, want in zip((out, lse), reference.forward(*args), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want)
    if library is cudnn:
        assert kernel.backward is None, "torch asks for one without a fixed order of sums"
        return
    for got, want in zip(
        kernel.backward(dout, out, lse, *args), reference.backward(dout, out, lse, *args), strict=True
    ):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_an_early_flash_attn_3_gives_the_lse_unasked(libraries, monkeypatch):
    monkeypatch.setattr(libraries.three, "flash_attn_varlen_func", flash_attn_3_early_forward)
    num_q, num_k, *tables = MANY["tiled"]
    args = (*inputs(num_q, num_k)[:3], *tables, SCALE)
    for got, want in zip(flash_attn_3.TABLE["flash_attention"].forward(*args), reference.forward(*args), strict=True):
        torch.testing.assert_close(got, want)


def test_rows_that_lie_as_the_library_wants_them_are_not_copied():
    queries, keys = samples.packed(*MANY["tiled"][2:], 9, 11)
    assert queries.rows is keys.rows is None and keys.longest == 10 and keys.bounds.tolist() == [0, 1, 11]
    x = torch.randn(9, N, H)
    assert queries.take(x) is x and queries.put(x, 9) is x
    joint, _ = samples.packed(*ONE["joint"][2:], 7, 7)
    assert joint.rows is None and joint.bounds.tolist() == [0, 7]
    apart, _ = samples.packed(*MANY["modality-major"][2:], 10, 10)
    assert apart.rows.tolist() == [0, 1, 2, 7, 3, 4, 5, 6, 8, 9]


def test_a_table_is_read_once_until_it_is_written_to(monkeypatch):
    spans, read = table([(0, 4)]), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(1) or tolist(x))
    assert samples.table_of(spans) == samples.table_of(spans) == (((0, 4),),) and len(read) == 1
    spans[0, 0, 1] = 3
    assert samples.table_of(spans) == (((0, 3),),) and len(read) == 2
    with torch.inference_mode():
        made = table([(1, 2)])
        assert samples.table_of(made) == samples.table_of(made) == (((1, 2),),) and len(read) == 3


def test_a_copy_of_a_table_has_numbers_of_its_own():
    """Also where it was written to as often as the table before."""
    spans = table([(0, 4)])
    for _ in range(5):
        spans[0, 0, 1] = 4
    assert samples.table_of(spans) == (((0, 4),),)
    other = copy.deepcopy(spans)
    assert other._version < spans._version and not vars(spans)
    while other._version < spans._version:
        other[0, 0, 1] = 3
    assert samples.table_of(other) == (((0, 3),),) and samples.table_of(spans) == (((0, 4),),)


def test_cudnn_is_called_as_torch_declares_it():
    """The real ops take these arguments: their shape functions run."""
    q, k, v = (torch.empty(rows, N, H, dtype=torch.bfloat16, device="meta") for rows in (7, 9, 9))
    one = [samples.Packed(None, torch.tensor([0, rows]), (rows,)) for rows in (7, 9)]
    out, lse = cudnn._attend(q, k, v, *one, SCALE)
    assert out.shape == q.shape and lse.shape == (N, 7) and lse.dtype == torch.float32


def missing(monkeypatch, error):
    def import_module(name):
        raise error

    monkeypatch.setattr(samples.importlib, "import_module", import_module)


def test_only_the_absence_of_the_library_itself_is_a_reason(monkeypatch):
    missing(monkeypatch, ModuleNotFoundError("no", name="flash_attn"))
    assert samples.library("flash_attn.flash_attn_interface", "flash-attn") == (None, "flash-attn is not installed")
    missing(monkeypatch, ModuleNotFoundError("no", name="einops"))
    with pytest.raises(ModuleNotFoundError):
        samples.library("flash_attn", "flash-attn")
    missing(monkeypatch, ImportError("undefined symbol"))
    with pytest.raises(ImportError, match="undefined symbol"):
        samples.library("flash_attn", "flash-attn")


def test_our_own_calls_in_the_place_of_the_library_are_not_the_library(monkeypatch):
    """As the quickstart puts them there; our op would call itself."""
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, compat)
    flash_attn._package.cache_clear()
    try:
        assert flash_attn._package() == (None, "flash_attn is uvg_engine.compat.flash_attn here")
    finally:
        flash_attn._package.cache_clear()


@pytest.mark.parametrize("version, reason", [("2.6.3", "flash-attn 2.6.3; from 2.7 on"), ("2.8.1.post1", None)])
def test_an_old_flash_attn_is_refused(monkeypatch, version, reason):
    monkeypatch.setattr(samples, "library", lambda module, package: (SimpleNamespace(__version__=version), None))
    flash_attn._package.cache_clear()
    try:
        assert flash_attn._package()[1] == reason
    finally:
        flash_attn._package.cache_clear()
