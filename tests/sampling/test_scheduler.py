"""Continuous batching: who starts when, what a failure touches, how requests leave."""

import itertools
import math
import weakref
from collections import Counter

import pytest
import torch
from tiny import alone, bits, make_engine, make_model, make_video, mixed_requests

from uvg_engine.media import HashTextEncoder, PixelCodec
from uvg_engine.sampling import Request, SamplingError

SOUND = (
    Request("generate", "one", seed=1, num_steps=3),
    Request("caption", video=make_video(), seed=2, num_steps=5),
    Request("joint", "two", seed=3, num_steps=4, trajectory=True),
)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def generate(seed, num_steps=2, **fields):
    return Request("generate", "one", seed=seed, num_steps=num_steps, **fields)


def test_requests_start_in_order_as_room_comes_free(engine):
    first = engine.scheduler().submit(generate(0))
    rows = first.num_rows
    assert rows == 2 * (8 + 2), "8 patches, a word and its end mark, in both branches"
    assert engine.scheduler().submit(generate(0, guidance=1)).num_rows == 10
    scheduler = engine.scheduler(max_rows=2 * rows)
    a, b, c, d = (scheduler.submit(generate(i, steps)) for i, steps in enumerate((1, 3, 2, 1)))
    assert (scheduler.num_waiting, scheduler.num_active, scheduler.has_room, scheduler.idle) == (4, 0, False, False)
    assert scheduler.step() == [a] and (b.steps_done, c.steps_done) == (1, 0)
    assert (scheduler.num_waiting, scheduler.num_active) == (2, 1)
    assert scheduler.step() == [] and (b.steps_done, c.steps_done, d.steps_done) == (2, 1, 0)
    assert not d.done and not scheduler.has_room
    assert scheduler.step() == [b, c] and scheduler.has_room
    assert scheduler.step() == [d] and scheduler.idle and scheduler.step() == []
    assert a.steps_done == a.num_steps == 1 and bits(c.result) == bits(alone(engine, generate(2, 2)))


def test_a_request_larger_than_the_room_runs_alone(engine):
    scheduler = engine.scheduler(max_rows=1)
    handles = [scheduler.submit(generate(i)) for i in range(2)]
    assert scheduler.step() == [] and [handle.steps_done for handle in handles] == [1, 0]
    assert list(scheduler.drain()) == handles


def test_drain_yields_in_the_order_of_the_ends(engine):
    scheduler = engine.scheduler()
    slow, fast = scheduler.submit(generate(0, 4)), scheduler.submit(generate(1, 2))
    ends = scheduler.drain()
    assert next(ends) is fast and not slow.done
    late = scheduler.submit(generate(2, 1))
    assert list(ends) == [late, slow] and scheduler.idle


def test_a_result_that_is_not_there_yet(engine):
    scheduler = engine.scheduler()
    handle = scheduler.submit(generate(0, 3))
    with pytest.raises(SamplingError, match="request must be done, got 0 of 3 steps"):
        _ = handle.result
    scheduler.step()
    with pytest.raises(SamplingError, match="request must be done, got 1 of 3 steps"):
        _ = handle.result


def test_cancel(engine):
    calls = []
    scheduler = engine.scheduler(max_rows=40, callback=lambda done, total, request: calls.append(request.seed))
    kept, running, waiting = (scheduler.submit(generate(i, 3)) for i in range(3))
    scheduler.step()
    assert (running.steps_done, waiting.steps_done) == (1, 0)
    for handle in (running, waiting):
        scheduler.cancel(handle)
        assert handle.done
        with pytest.raises(SamplingError, match="request was cancelled"):
            _ = handle.result
    assert (scheduler.num_active, scheduler.num_waiting) == (1, 0) and running.steps_done == 1
    assert list(scheduler.drain()) == [kept] and calls == [0, 1, 0, 0]
    assert bits(kept.result) == bits(alone(engine, generate(0, 3)))
    scheduler.cancel(kept)
    assert kept.result.seed == 0, "what is done stays"
    with pytest.raises(ValueError, match="handle must be one of this scheduler's"):
        scheduler.cancel(engine.scheduler().submit(generate(0)))


def test_cancel_from_the_callback(engine):
    def stop(done, total, request):
        if request.seed == 1:
            scheduler.cancel(handles[1])

    scheduler = engine.scheduler(callback=stop)
    handles = [scheduler.submit(generate(i)) for i in range(3)]
    assert list(scheduler.drain()) == [handles[0], handles[2]] and handles[1].steps_done == 1


class OddEncoder(HashTextEncoder):
    """Fails on some prompts: by an exception, by rows of a wrong width, by numbers that are none."""

    def encode(self, texts):
        (rows,) = super().encode(texts)
        if texts[0] == "fast":
            raise RuntimeError("the encoder fell over")
        if texts[0] == "slow":
            return [rows[:, 1:]]
        return [rows * math.nan if texts[0] == "blue" else rows]


class OddCodec(PixelCodec):
    """Fails on videos whose first pixel is 0 (exception) or 1 (wrong shape)."""

    def encode(self, frames):
        first = int(frames.flatten()[0])
        if first == 0:
            raise RuntimeError("the codec fell over")
        return super().encode(frames)[: -1 if first == 1 else None]


def caption(first):
    video = make_video()
    video[0, 0, 0, 0] = first
    return Request("caption", video=video)


TOKEN = "the model gave no distribution for a token"
VIDEO = "the model's velocity led to a video that is not finite"
FAILURES = [
    (RuntimeError, "the encoder fell over", lambda: Request("generate", "fast", num_steps=2)),
    (ValueError, r"text encoder must return rows of 16, got \(1, 15\)", lambda: Request("joint", "slow", num_steps=2)),
    (RuntimeError, "the codec fell over", lambda: caption(0)),
    (ValueError, r"codec must encode to \(12, 2, 4, 4\), got", lambda: caption(1)),
    (SamplingError, VIDEO, lambda: Request("generate", "blue", num_steps=2)),
    (SamplingError, VIDEO, lambda: Request("generate", "blue", num_steps=3, trajectory=True)),
    (SamplingError, VIDEO, lambda: Request("generate", "blue", num_steps=3, trajectory=2, solver="unipc")),
    (SamplingError, TOKEN, lambda: Request("joint", "blue", num_steps=1)),
    (SamplingError, TOKEN, lambda: Request("joint", "blue", num_steps=1, temperature=0)),
    (SamplingError, f"{TOKEN}|{VIDEO}", lambda: Request("joint", "blue", num_steps=4, trajectory=True)),
]  # fmt: skip


@pytest.mark.parametrize("kind, match, make", FAILURES)
def test_a_failure_touches_its_own_request_only(kind, match, make):
    model = make_model()
    engine = make_engine(model, text_encoder=OddEncoder(16, 9), codec=OddCodec((2, 4, 4), (1, 2, 2)))
    scheduler = engine.scheduler()
    before, broken, *after = (scheduler.submit(request) for request in (SOUND[0], make(), *SOUND[1:]))
    ended = list(scheduler.drain())
    assert sorted(map(id, ended)) == sorted(map(id, (before, broken, *after))), "each is told once"
    with pytest.raises(kind, match=match):
        _ = broken.result
    for handle, request in zip((before, *after), SOUND, strict=True):
        assert bits(handle.result) == bits(alone(make_engine(model), request))
    with pytest.raises(kind, match=match):
        engine.run([SOUND[0], make()])
    with pytest.raises(kind, match=match):
        list(engine.stream([make(), SOUND[0]]))


def test_a_model_of_nan_fails_every_request_and_says_so():
    model = make_model()
    with torch.no_grad():
        model.text_head.linear.bias[3] = math.nan
        model.video_head.proj_out.bias[3] = math.inf
    engine = make_engine(model)
    scheduler = engine.scheduler()
    handles = [scheduler.submit(request) for request in SOUND]
    assert len(list(scheduler.drain())) == 3
    for handle, match in zip(handles, (VIDEO, TOKEN, f"{VIDEO}|{TOKEN}"), strict=True):
        with pytest.raises(SamplingError, match=match):
            _ = handle.result


def test_an_error_of_the_callback_loses_no_request(engine):
    fail = [True, False]

    def callback(done, total, request):
        if fail and fail.pop(0):
            raise KeyboardInterrupt

    scheduler = engine.scheduler(callback=callback)
    one, two = scheduler.submit(generate(0, 1)), scheduler.submit(generate(1, 2))
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    assert one.done and not two.done and not scheduler.idle
    assert list(scheduler.drain()) == [one, two]
    assert bits(two.result) == bits(alone(engine, generate(1, 2)))


def test_an_error_of_a_whole_step_leaves_every_request_where_it_was(engine):
    """As when memory runs out: here the model's weights go missing for one step."""
    model = make_model()
    scheduler = make_engine(model).scheduler()
    handles = [scheduler.submit(request) for request in SOUND]
    scheduler.step()
    weight, model.vocab_embed.weight = model.vocab_embed.weight, None
    with pytest.raises(TypeError):
        scheduler.step()
    assert [handle.steps_done for handle in handles] == [1, 1, 1]
    model.vocab_embed.weight = weight
    assert len(list(scheduler.drain())) == 3
    for handle, request in zip(handles, SOUND, strict=True):
        assert bits(handle.result) == bits(alone(engine, request))


class InterruptedCodec(PixelCodec):
    """Ctrl-C comes in every second call of a method."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.calls = Counter()

    def count(self, name):
        self.calls[name] += 1
        if self.calls[name] % 2 == 0:
            raise KeyboardInterrupt

    def encode(self, frames):
        self.count("encode")
        return super().encode(frames)

    def decode(self, latent):
        self.count("decode")
        return super().decode(latent)


def test_ctrl_c_at_the_start_or_the_end_of_a_request_loses_none():
    model, ended, interrupted = make_model(), [], 0
    requests = (*SOUND, Request("caption", video=make_video(1), seed=4, num_steps=2), generate(5, 4), generate(6, 4))
    codec = InterruptedCodec((2, 4, 4), (1, 2, 2))
    scheduler = make_engine(model, codec=codec).scheduler()
    handles = [scheduler.submit(request) for request in requests]
    while not scheduler.idle:
        try:
            ended += scheduler.step()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == sum(count // 2 for count in codec.calls.values()) >= 4 and min(codec.calls.values()) > 1
    assert sorted(map(id, ended)) == sorted(map(id, handles))
    for handle, request in zip(handles, requests, strict=True):
        assert bits(handle.result) == bits(alone(make_engine(model), request))


class LargeCodec(PixelCodec):
    """Runs out of memory while it holds something."""

    def decode(self, latent):
        held = latent.clone()
        self.held = weakref.ref(held)
        raise torch.OutOfMemoryError("no memory")


def test_a_failed_request_holds_no_memory_of_the_functions_that_failed():
    engine = make_engine(codec=LargeCodec((2, 4, 4), (1, 2, 2)))
    scheduler = engine.scheduler()
    handle = scheduler.submit(generate(0, 1))
    assert scheduler.step() == [handle] and engine.codec.held() is None
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        _ = handle.result


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_changed_while_nothing_ran_are_seen(dtype):
    """Keys and values of the condition that says nothing, and the head in another dtype, were those of before."""
    model = make_model()
    model.compute_dtype = dtype
    engine = make_engine(model)
    scheduler = engine.scheduler()
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(factor)
        handles = [scheduler.submit(request) for request in SOUND]
        assert len(list(scheduler.drain())) == 3
        for handle, request in zip(handles, SOUND, strict=True):
            assert bits(handle.result) == bits(alone(engine, request))


def test_a_result_holds_no_memory_of_its_neighbours(engine):
    for result in engine.run([generate(i) for i in range(3)] + [SOUND[2]]):
        for tensor in (result.latent, result.frames, *(result.trajectory.frames if result.trajectory else ())):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_stream_takes_from_an_endless_source_only_what_has_room():
    engine, taken = make_engine(max_rows=70), []

    def endless():
        for i in itertools.count():
            taken.append(generate(i, 1 + i % 3))
            yield taken[-1]

    got = list(itertools.islice(engine.stream(endless()), 7))
    assert len(taken) <= 7 + 4, "four of them fill the room"
    assert sorted(place for place, _ in got) != [place for place, _ in got], "the short ones end first"
    for place, result in got:
        assert bits(result) == bits(alone(engine, taken[place]))


def test_stream_of_a_list_tells_each_place_once(engine):
    calls, requests = [], mixed_requests()
    got = dict(engine.stream(requests, callback=lambda *call: calls.append(call)))
    assert sorted(got) == list(range(len(requests))) and len(calls) >= len(requests)
    assert [bits(got[i]) for i in range(len(requests))] == list(map(bits, engine.run(requests)))
    assert list(engine.stream([])) == []


def test_stream_stops_at_a_request_that_cannot_be(engine):
    results = engine.stream([generate(0, 1), "a red seven"])
    with pytest.raises(ValueError, match="request must be a Request, got str"):
        list(results)
