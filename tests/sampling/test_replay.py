"""Forwards replayed from a recording: nothing but time changes; no recording outlives what it was made of."""

import copy
import dataclasses
import gc
import threading

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tests.sampling.tiny import alone, bits, make_engine, make_model, make_video
from uvg_engine import backends
from uvg_engine.backends import native
from uvg_engine.sampling import Request, Savings, replay

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"recordings are of the native core: {native.why_not()}")

FIRST = Request("generate", "a red seven", seed=3, num_steps=5)
LIKE_IT = Request("generate", "the two blue", seed=8, num_steps=4)  # as many words
KINDS = {
    "generate": LIKE_IT,
    "caption": Request("caption", video=make_video(1), seed=5, num_steps=6),
    "joint": Request("joint", "one red three", seed=2, num_steps=4),
}


@pytest.fixture
def forwards(monkeypatch):
    """Of how many rows each forward was that ran in Python, recorded ones too."""
    seen, packed = [], type(make_model()).packed

    def spy(self, *args, **kwargs):
        seen.append(args[2].num_rows)
        return packed(self, *args, **kwargs)

    monkeypatch.setattr("uvg_engine.model.UniViGU.packed", spy)
    return seen


def plainly(model, request):
    return alone(make_engine(model, savings=Savings(replay=False)), request)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replayed_has_the_same_bits(kind, forwards):
    engine, model = make_engine(), make_model()
    alone(engine, FIRST)
    for seed in range(3):
        request = copy.copy(KINDS[kind])
        object.__setattr__(request, "seed", seed)
        assert bits(alone(engine, request)) == bits(plainly(model, request))


def test_a_forward_runs_twice_in_python_and_never_again(forwards):
    engine = make_engine()
    alone(engine, FIRST)
    assert len(forwards) == 2
    alone(engine, LIKE_IT)
    assert len(forwards) == 2
    alone(engine, Request("generate", "one", seed=3, num_steps=4))
    assert len(forwards) == 4


def test_a_default_device_of_the_cpu_keeps_replays(forwards):
    engine = make_engine()
    with torch.device("cpu"):
        result = alone(engine, FIRST)
        assert len(forwards) == 2
    assert bits(result) == bits(plainly(engine.model, FIRST))


def test_a_batch_of_changing_requests_has_the_bits_of_each_alone():
    engine, model = make_engine(), make_model()
    requests = [*KINDS.values(), FIRST, Request("joint", "a green three", seed=11, num_steps=7, guidance=1)]
    want = [bits(plainly(model, request)) for request in requests]
    for _ in range(3):
        scheduler = engine.scheduler(max_rows=200)
        handles = [scheduler.submit(request) for request in requests]
        list(scheduler.drain())
        assert [bits(handle.result) for handle in handles] == want


@pytest.mark.parametrize("guided", [(0,), (1,), (0, 2), (1, 2)])
def test_a_recording_knows_which_samples_are_guided(guided):
    engine, model = make_engine(), make_model()
    seeds = {"a red seven": 1, "the two blue": 2, "down fast green": 3}

    def requests(guided):
        settings = [(prompt, seed, 3 if k in guided else 1) for k, (prompt, seed) in enumerate(seeds.items())]
        return [Request("generate", p, seed=s, num_steps=5, guidance=g) for p, s, g in settings]

    engine.run(requests((0, 1) if len(guided) > 1 else (2,)))  # as many branches of the same sizes
    got = engine.run(requests(guided))
    assert [bits(one) for one in got] == [bits(plainly(model, request)) for request in requests(guided)]


CHANGES = {
    "a packed weight": lambda m: m.blocks[1].attn1.to_q.weight.mul_(1.5),
    "a packed weight behind its version": lambda m: m.blocks[1].attn1.to_q.weight.data.mul_(1.5),
    "an expert": lambda m: m.blocks[0].experts.w2.mul_(1.5),
    "a bias": lambda m: m.blocks[0].attn2.to_out[0].bias.add_(1),
    "a table": lambda m: m.scale_shift_table_v.add_(1),
    "the patches": lambda m: m.patch_embedding.weight.mul_(1.5),
    "another parameter": lambda m: setattr(
        m.blocks[0].norm2, "weight", torch.nn.Parameter(m.blocks[0].norm2.weight * 2)
    ),
    "another module": lambda m: m.blocks[0].attn1.to_out.__setitem__(0, torch.nn.Linear(32, 32)),
    "positions": lambda m: m.load_state_dict({**m.state_dict(), "rotary_emb_text.inv_freq": torch.rand(8)}),
    "strides": lambda m: setattr(m.blocks[0].norm2.weight, "data", m.blocks[0].norm2.weight.data[:1].expand(32)),
    "what it predicts": lambda m: setattr(m, "config", dataclasses.replace(m.config, prediction="sample")),
    "bytes": lambda m: setattr(m, "int8", True),
    "dtype of the products": lambda m: setattr(m, "compute_dtype", torch.bfloat16),
    "dtype": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_changes_is_read_anew(what):
    torch.manual_seed(0)
    engine = make_engine()
    before = bits(alone(engine, FIRST))
    assert bits(alone(engine, FIRST)) == before
    with torch.no_grad():
        CHANGES[what](engine.model)
    for _ in range(3):
        got = bits(alone(engine, FIRST))
        assert got == bits(plainly(copy.deepcopy(engine.model), FIRST)) and got != before


def test_an_engine_may_get_another_model():
    engine = make_engine()
    alone(engine, FIRST)
    for seed in (1, 0):
        engine.model = make_model(seed)
        for _ in range(2):
            assert bits(alone(engine, FIRST)) == bits(plainly(make_model(seed), FIRST))


def test_a_model_may_lack_what_nobody_reads():
    model = make_model()
    model.video_head = None
    alone(make_engine(model), KINDS["caption"])


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attentions += func is torch.ops.uvg.flash_attention.default
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_every_op():
    engine = make_engine()
    alone(engine, FIRST)
    alone(engine, FIRST)
    counts = []
    for watched in (engine, make_engine(savings=Savings(replay=False))):
        with Watch() as watch:
            alone(watched, FIRST)
        counts.append(watch.attentions)
    assert counts[0] == counts[1] > 0


def test_hooks_are_called(forwards):
    engine, seen = make_engine(), []
    alone(engine, FIRST)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(engine.model.blocks[0].experts, register)(lambda *args: seen.append(1))
        alone(engine, FIRST)
        handle.remove()
    assert len(seen) == 2 * FIRST.num_steps
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        del seen[:]
        handle = register(
            lambda module, *args: seen.append(module) if module is engine.model.blocks[0].experts else None
        )
        alone(engine, FIRST)
        handle.remove()
        assert len(seen) == FIRST.num_steps
    del forwards[:]
    alone(engine, FIRST)
    assert not forwards


def test_another_backend_is_not_recorded(forwards):
    engine = make_engine()
    alone(engine, FIRST)
    del forwards[:]
    with backends.force("reference"):
        alone(engine, FIRST)
        got = bits(alone(engine, FIRST))
        assert got == bits(plainly(make_model(), FIRST))
    tried = [one for one in engine.replays._known.values() if one is False]
    assert tried and len(forwards) == 3 * FIRST.num_steps + len(tried)


def test_memory_is_bounded(forwards, monkeypatch):
    engine = make_engine()
    alone(engine, FIRST)
    (held,) = (one.num_bytes for one in engine.replays._known.values() if one is not True)
    assert 0 < held < 1 << 22
    monkeypatch.setattr(replay, "MOST_BYTES", int(1.5 * held))
    alone(engine, KINDS["joint"])  # takes the place of the first one
    assert sum(one.num_bytes for one in engine.replays._known.values() if not isinstance(one, bool)) <= 1.5 * held
    del forwards[:]
    alone(engine, FIRST)
    assert forwards
    monkeypatch.setattr(replay, "MOST_BYTES", 1000)
    engine = make_engine()
    del forwards[:]
    long = Request("generate", "a red seven moving right", seed=3, num_steps=4)
    assert bits(alone(engine, long)) == bits(plainly(engine.model, long))
    assert len(forwards) == 2 * long.num_steps + 1  # one of them was to be recorded
    assert [one for one in engine.replays._known.values() if one is not False] == []


def test_conditions_count_as_memory_and_are_not_kept(forwards, monkeypatch):
    engine = make_engine()
    alone(engine, FIRST)
    (one,) = (each for each in engine.replays._known.values() if each is not True)
    assert one.num_bytes == one.recording.num_bytes + sum(x.nbytes for x in (*one.changing, *one.resting))
    gc.collect()
    assert one.given() is None
    monkeypatch.setattr(replay, "MOST_BYTES", one.num_bytes - 1)
    engine = make_engine()
    alone(engine, FIRST)
    assert set(engine.replays._known.values()) == {False}


def test_recordings_do_not_drive_each_other_out(monkeypatch):
    engine, prompts, taken = make_engine(), ("one", "a red", "a red seven"), []
    for prompt in prompts:
        alone(engine, Request("generate", prompt, seed=1, num_steps=3))
    sizes = [one.num_bytes for one in engine.replays._known.values() if not isinstance(one, bool)]
    assert len(sizes) == 3
    monkeypatch.setattr(replay, "MOST_BYTES", sum(sizes) - 1)
    monkeypatch.setattr(replay, "Recording", lambda *args, real=replay.Recording: taken.append(1) or real(*args))
    engine = make_engine()
    schedulers = [engine.scheduler() for _ in prompts]
    handles = [
        scheduler.submit(Request("generate", prompt, seed=1, num_steps=40))
        for scheduler, prompt in zip(schedulers, prompts, strict=True)
    ]
    while not all(handle.done for handle in handles):
        for scheduler in schedulers:
            scheduler.step()
    assert len(taken) <= 3 + 3 * 40 // 64


def test_a_copy_that_was_cut_short_is_made_again(monkeypatch):
    engine = make_engine()
    want = bits(alone(engine, FIRST))
    (one,) = (each for each in engine.replays._known.values() if each is not True)
    first, second = ([torch.full_like(x, k) for x in one.resting] for k in (1, 2))
    one.replay(one.changing, first)

    def cut_short(own, values):
        own[0].copy_(values[0])
        if own is one.resting:
            raise KeyboardInterrupt

    monkeypatch.setattr(replay, "_fill", cut_short)
    with pytest.raises(KeyboardInterrupt):
        one.replay(one.changing, second)
    monkeypatch.undo()
    assert one.replay(one.changing, first)
    assert all(torch.equal(own, value) for own, value in zip(one.resting, first, strict=True))
    assert bits(alone(engine, FIRST)) == want


def test_two_threads_share_an_engine():
    engine, model = make_engine(), make_model()
    want = {name: bits(plainly(model, request)) for name, request in KINDS.items()}
    wrong, together = [], threading.Barrier(2)

    def serve():
        together.wait()
        for _ in range(4):
            for name, request in KINDS.items():
                if bits(alone(engine, request)) != want[name]:
                    wrong.append(name)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_engine_can_be_copied():
    engine = make_engine()
    want = bits(alone(engine, FIRST))
    assert bits(alone(copy.deepcopy(engine), FIRST)) == want
