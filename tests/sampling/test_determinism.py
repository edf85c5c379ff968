"""The same request with the same seed gives the same bits, whatever the batch, order, room, arrival and savings."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import alone, bits, make_engine, make_model, make_video, mixed_requests
from torch.utils._python_dispatch import TorchDispatchMode

from uvg_engine.backends import native
from uvg_engine.ops import jump_coins
from uvg_engine.sampling import Engine, Request, Savings

NUM = len(mixed_requests())
ROUNDED = {"drop_padding", "constant_condition", *(() if native.cpu() else ("skip_unread",))}
EXACT = [field.name for field in dataclasses.fields(Savings) if field.name not in ROUNDED]


@functools.cache
def engine():
    return make_engine()


@functools.cache
def bits_alone():
    return [bits(alone(engine(), request)) for request in mixed_requests()]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    picks=st.lists(st.integers(0, NUM - 1), min_size=1, max_size=7),
    max_rows=st.sampled_from([1, 50, 120, 10_000]),
    arrivals=st.lists(st.integers(0, 4), min_size=7, max_size=7),
    cancelled=st.none() | st.integers(0, 6),
)
def test_any_mix_in_any_order_with_any_arrival(picks, max_rows, arrivals, cancelled):
    """Request i is submitted arrivals[i] steps after the one before; one of them may be cancelled on its way."""
    scheduler, handles = engine().scheduler(max_rows=max_rows), []
    for pick, wait in zip(picks, arrivals, strict=False):
        for _ in range(wait):
            scheduler.step()
        handles.append(scheduler.submit(mixed_requests()[pick]))
    scheduler.step()
    if cancelled is not None and cancelled < len(handles):
        scheduler.cancel(handles[cancelled])
    ended = list(scheduler.drain())
    assert scheduler.idle and len(set(ended)) == len(ended)
    for i, (pick, handle) in enumerate(zip(picks, handles, strict=True)):
        if i != cancelled or handle in ended:
            assert handle.done
        if i != cancelled:
            assert bits(handle.result) == bits_alone()[pick]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# rows and widths past the size from which torch splits element-wise work over threads (32,768)
WIDE = (
    Request("generate", "a red seven", seed=1, num_steps=1, guidance=1, frames=8, height=40, width=40),
    Request("caption", video=make_video(1, (6, 40, 24)), seed=2, num_steps=1, frames=6, height=40, width=24),
    Request("joint", "two", seed=3, num_steps=2, solver="unipc", guidance=2.0, height=40, width=24),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_one_thread_and_on_two(threads, dtype):
    """The number of threads may itself change the rounding of a matrix product; the neighbours may not."""
    engine = make_engine(make_model(heads=4, head_dim=40, ffn_dim=200, layers=1).to(dtype))
    want = [bits(alone(engine, request)) for request in WIDE]
    for picks in ((0, 1, 2), (2, 1, 0, 2)):
        assert [bits(result) for result in engine.run([WIDE[i] for i in picks])] == [want[i] for i in picks]


@pytest.mark.parametrize("head_dim", [34, 10])
def test_with_heads_of_no_vector_width(head_dim):
    """Rows that are no whole number of cache lines: a sample among others then starts off a line."""
    engine = make_engine(make_model(heads=3, head_dim=head_dim, layers=1))
    together = engine.run(mixed_requests())
    assert list(map(bits, together)) == [bits(alone(engine, request)) for request in mixed_requests()]


@pytest.mark.parametrize("off", [*([name] for name in EXACT), EXACT], ids="-".join)
def test_a_saving_switched_off_changes_nothing(off):
    if off == ["replay"] and native.cpu() is None:
        pytest.skip(f"recordings are of the native core: {native.why_not()}")
    savings = Savings(**dict.fromkeys(off, False))
    got = make_engine(engine().model, savings=savings).run(mixed_requests())
    assert list(map(bits, got)) == bits_alone()
    scheduler = engine().scheduler(savings=savings, max_rows=60)
    handles = [scheduler.submit(request) for request in mixed_requests()]
    assert len(list(scheduler.drain())) == len(handles) and [bits(h.result) for h in handles] == bits_alone()


@pytest.mark.skipif("skip_unread" in ROUNDED, reason="a library's attention of fewer queries")
def test_a_few_rows_that_are_read_have_the_bits_that_they_have_among_all():
    """A text of three rows, a video of two: attention may serve so few queries in a way of its own."""
    requests = (
        Request("caption", video=make_video(), seed=1, num_steps=6),
        Request("generate", "a red", seed=2, num_steps=2, guidance=2.0, frames=4, height=8, width=8),
    )
    plain = make_engine(engine().model, defaults={"text_length": 3}, savings=Savings(skip_unread=False))
    saving = make_engine(engine().model, defaults={"text_length": 3})
    assert [bits(alone(saving, r)) for r in requests] == [bits(alone(plain, r)) for r in requests]


@pytest.mark.parametrize("off", [*([name] for name in sorted(ROUNDED)), None], ids=[*sorted(ROUNDED), "all"])
def test_what_changes_the_order_of_sums_changes_only_the_rounding(off):
    """Masked keys, among which the prompt is computed; the weights of equal values, whose sum is 1 to rounding only;
    a library's attention of fewer queries."""
    savings = Savings.none() if off is None else Savings(**dict.fromkeys(off, False))
    got = make_engine(engine().model, savings=savings).run(mixed_requests())
    for request, one, want in zip(mixed_requests(), got, bits_alone(), strict=True):
        if off == ["drop_padding"] and request.kind != "generate":
            assert bits(one) == want
            continue
        expected = alone(engine(), request)
        if request.kind != "generate":
            assert one.tokens == expected.tokens
        if request.kind != "caption":
            assert (one.latent - expected.latent).norm() <= 1e-5 * expected.latent.norm()


class Work(TorchDispatchMode):
    """Counts what ops write, in elements, and the calls of attention."""

    def __init__(self):
        super().__init__()
        self.elements = self.attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.attentions += func is torch.ops.uvg.flash_attention.default
        if not func.is_view:
            parts = out if isinstance(out, (tuple, list)) else [out]
            self.elements += sum(part.numel() for part in parts if isinstance(part, torch.Tensor))
        return out


SAVED_BY = {
    "lazy_head": Request("caption", video=make_video(), seed=1, num_steps=6),
    "skip_idle": Request("caption", video=make_video(), seed=1, num_steps=40),
    "condition_cache": Request("generate", "a red seven", seed=1, num_steps=3),
    "constant_condition": Request("caption", video=make_video(), seed=1, num_steps=3),
    "share_first_attention": Request("generate", "a red seven", seed=1, num_steps=3),
    "time_tables": Request("generate", "a red seven", seed=1, num_steps=3),
    "skip_unguided": Request("generate", "a red seven", seed=1, num_steps=3, guidance=1),
    "skip_unread": Request("generate", "a red seven", seed=1, num_steps=3),
    "drop_padding": Request("generate", "a", seed=1, num_steps=3),
}


@pytest.mark.parametrize("name", SAVED_BY)
def test_a_saving_saves(name):
    fields = {field.name for field in dataclasses.fields(Savings)}
    assert set(SAVED_BY) == fields - {"replay"}  # which saves no op: test_replay.py
    alone(engine(), SAVED_BY[name])  # the model's table of angles is made at its first use
    work = []
    for on in (True, False):
        with Work() as counted:
            alone(make_engine(engine().model, savings=Savings(**{name: on})), SAVED_BY[name])
        work.append(counted.elements)
    assert work[0] < work[1]


def test_a_caption_takes_one_forward_for_each_step_in_which_a_token_jumps():
    request = Request("caption", video=make_video(), seed=1, num_steps=60, text_rule="exact")
    with Work() as counted:
        alone(engine(), request)
    length = engine().defaults.text_length
    prob = torch.tensor([1 / (60 - i) for i in range(60)])  # kappa_t = t
    spans = torch.tensor([[i * length, length] for i in range(60)], dtype=torch.int32)
    coins = jump_coins(prob, torch.full((60,), 1), torch.arange(60), spans, 60 * length).view(60, length)
    forwards = int(coins.any(1).sum())
    assert counted.attentions == forwards * engine().model.config.layers and 1 < forwards < 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torchs_default_dtype_is_that_of_nothing(dtype):
    """In bf16 the times of the steps had eight bits; in fp64 the latents of a step were fp64."""
    before, want = torch.get_default_dtype(), bits_alone()
    torch.set_default_dtype(dtype)
    try:
        assert [bits(alone(engine(), request)) for request in mixed_requests()] == want
        assert bits(alone(make_engine(engine().model), mixed_requests()[0])) == want[0]
    finally:
        torch.set_default_dtype(before)


def test_torchs_default_device_is_that_of_nothing(tmp_path):
    """As under torch.set_default_device("cuda") with a model on the CPU."""
    want = bits_alone()
    engine().save_pretrained(tmp_path / "saved")
    with torch.device("meta"):
        assert [bits(alone(engine(), request)) for request in mixed_requests()] == want
        streamed = dict(engine().stream(mixed_requests()))
        assert [bits(streamed[place]) for place in range(NUM)] == want
        assert bits(alone(Engine.from_pretrained(tmp_path / "saved"), mixed_requests()[0])) == want[0]
        assert torch.empty(0).is_meta  # the caller's own, also after an engine's work
    assert bits(alone(engine(), mixed_requests()[0])) == want[0]
