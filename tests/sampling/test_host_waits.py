"""A step on a GPU: the host gives it numbers without waiting, reads nothing back, and looks at what was drawn a step
later. Meta tensors are the GPU: they have no memory, and raise where the host asks for a value."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.sampling.tiny import bits, make_engine, make_model, make_video, mixed_requests
from uvg_engine.backends import devices
from uvg_engine.media import HashTextEncoder
from uvg_engine.sampling import Request, SamplingError, Savings
from uvg_engine.sampling.loop import Loop

STEPS = (
    Request("joint", "a red seven", seed=3, num_steps=6),
    Request("generate", "one", seed=3, num_steps=5, solver="unipc", guidance=2.5),
    Request("caption", video=make_video(), seed=9, num_steps=6, text_rule="exact", temperature=0.5),
)
GPU = torch.device("meta")


class BlueIsNothing(HashTextEncoder):
    """NaN for the prompt "blue"."""

    def encode(self, texts):
        return [rows * math.nan if text == "blue" else rows for text, rows in zip(texts, super().encode(texts))]


def outcome(handle):
    try:
        return bits(handle.result)
    except SamplingError as error:
        return str(error), handle.steps_done


def outcomes(seen):
    engine = make_engine(text_encoder=BlueIsNothing(16, 9))
    scheduler = engine.scheduler(callback=lambda done, total, request: seen.append((request.kind, done)))
    broken = [Request("joint", "blue", seed=seed, num_steps=n) for seed, n in ((1, 1), (2, 4), (3, 7), (4, 12))]
    broken.append(Request("joint", "blue", seed=5, num_steps=6, trajectory=True))
    handles = [scheduler.submit(request) for request in (broken[0], *mixed_requests(), *broken[1:])]
    assert sorted(map(id, scheduler.drain())) == sorted(map(id, handles))
    return [outcome(handle) for handle in handles]


def test_a_look_a_step_later_changes_no_result_and_no_error(monkeypatch):
    at_once = outcomes(first := [])
    monkeypatch.setattr(Loop, "_looks_later", True)
    later = outcomes(second := [])
    assert later == at_once and sum("distribution" in each[0] for each in later) >= 4
    assert set(second) == set(first) and len(second) > len(first), "some failed in the middle"


def on_gpu(x):
    return isinstance(x, torch.Tensor) and x.is_meta


class StandIn(TorchFunctionMode):
    """Tensors without memory are those of a GPU: torch raises where the host asks for a value of theirs. Here it does
    too where a tensor of the host is copied to them by another way than `devices.put`."""

    num_put = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        copies = {torch.tensor: 0, torch.as_tensor: 0, torch.Tensor.to: 1, torch.Tensor.copy_: 2}  # to its tensors
        to_gpu = func in copies and not (copies[func] and all(map(on_gpu, args[: copies[func]])))
        if to_gpu and on_gpu(out):
            raise AssertionError(f"the host waits for the GPU in {func}")
        return out

    def put(self, x, device):
        with torch._C.DisableTorchFunction():
            self.num_put += not x.is_meta
            return x.to(device)

    def fetch(self, x):
        assert on_gpu(x)
        return lambda: torch.zeros(x.shape, dtype=x.dtype)  # sound tokens


@pytest.fixture
def gpu(monkeypatch):
    stand_in = StandIn()
    ours = [module for name, module in sys.modules.items() if name.startswith("uvg_engine.")]
    for function in (devices.put, devices.fetch):
        for module in ours:
            if getattr(module, function.__name__, None) is function:
                monkeypatch.setattr(module, function.__name__, getattr(stand_in, function.__name__))
    monkeypatch.setattr(Loop, "_looks_later", True)
    with stand_in:
        yield stand_in


def test_a_step_waits_for_no_gpu(gpu):
    """Neither to give it something nor to read from it, whatever the job and the solver."""
    with torch._C.DisableTorchFunction():
        model = make_model().to("meta")
    scheduler = make_engine(model, savings=Savings(constant_condition=False)).scheduler()
    handles = [scheduler.submit(request) for request in STEPS]
    for step in range(1, 5):
        assert scheduler.step() == [] and [handle.steps_done for handle in handles] == [step] * 3
    assert gpu.num_put > 40


@pytest.mark.parametrize(
    "wait, error, told",
    [
        (lambda x: bool((x < 0).any()), RuntimeError, "cannot be called on meta tensors"),
        (lambda x: x.tolist(), NotImplementedError, "Cannot copy out of meta tensor"),
        (lambda x: x.cpu(), NotImplementedError, "Cannot copy out of meta tensor"),
        (lambda x: torch.tensor([1], device=x.device), AssertionError, "the host waits for the GPU"),
        (lambda x: torch.ones(2).to(x.device), AssertionError, "the host waits for the GPU"),
        (lambda x: x.copy_(torch.ones(2)), AssertionError, "the host waits for the GPU"),
    ],
)
def test_the_stand_in_tells_of_waits(gpu, wait, error, told):
    with pytest.raises(error, match=told):
        wait(torch.zeros(2, device=GPU))


@pytest.mark.parametrize("capturing, calls", [(False, ["pin", ("to", True)]), (True, [("to", False)])])
def test_what_goes_to_a_gpu_is_pinned_but_in_a_captured_graph(capturing, calls, monkeypatch):
    """A replay would read pinned memory again, which is another tensor's by then."""
    seen, gpu = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    x = SimpleNamespace(is_cpu=True, pin_memory=lambda: seen.append("pin") or x)
    x.to = lambda device, non_blocking=False: seen.append(("to", non_blocking)) or (x, device)
    assert devices.put(x, gpu) == (x, gpu) and seen == calls
    assert devices.put(values := torch.ones(2), torch.device("cpu")) is values


def test_what_is_fetched_is_what_it_was():
    x = torch.tensor([1, 2])
    taken = devices.fetch(x)
    x[0] = 5
    assert taken().tolist() == [1, 2]
