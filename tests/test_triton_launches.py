"""What host functions of kernels/ do on a device, seen without one: on meta tensors, where a look at a value raises.

A launch that waits for no value, with a grid that depends on shapes alone, and memory from torch's allocator: that is
what a CUDA graph can replay.
"""

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uvg_engine import ops
from uvg_engine.backends import devices
from uvg_engine.backends import triton as backend

pytest.importorskip("triton", reason="triton is not installed")

from bench import aot
from uvg_engine.kernels import _head, _launch, flash_attention, moe_mlp

CASES = [(op, case) for op in aot.ops() for case in aot.cases(op)]
CALM = {"empty", "new_empty", "empty_like", "clone", "_to_copy", "zeros", "new_zeros", "zeros_like"}  # memory
CALM |= {"alias", "as_strided", "detach", "expand", "permute", "select", "slice", "transpose", "unsqueeze", "view"}


class Calls(TorchDispatchMode):
    """Notes each operator of torch that is called, and where its results lie."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        self.devices |= {x.device.type for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize("capability", _launch.ALL, ids=str)
@pytest.mark.parametrize("op, case", CASES, ids=[f"{op}-{case.name}" for op, case in CASES])
def test_host_functions_wait_for_nothing(op, case, capability):
    if capability not in case.capabilities:
        pytest.skip("not a case of this architecture")
    seen = []
    for _ in range(2):
        with _launch.recording(capability) as launches, Calls() as calls:
            case.call()
        assert calls.devices <= {"meta"}, "a tensor made on the host would be copied to the device: a graph cannot"
        assert calls.names <= CALM, "only memory is asked for: the work is the kernels'"
        seen.append([(launch.name, launch.grid, dict(launch.options)) for launch in launches])
    assert seen[0] and seen[0] == seen[1]
    for _, grid, _ in seen[0]:
        assert all(type(size) is int and size > 0 for size in grid)
        assert grid[0] < 2**31 and all(size < 2**16 for size in grid[1:]), "CUDA's limits of a grid"


def test_a_look_at_a_value_would_be_seen():
    spans = torch.empty(2, 2, dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError):
        spans.tolist()
    with pytest.raises((RuntimeError, NotImplementedError)):
        spans.max().item()


def test_an_empty_grid_starts_nothing():
    with _launch.recording(_launch.SM90) as launches:
        _launch.launch(None, (0, 3), torch.empty(0))
    assert launches == []


def test_a_first_call_says_what_it_compiles(caplog):
    class Kernel:
        __name__ = "some_kernel"

        def __getitem__(self, grid):
            return lambda *args, **options: None

    x = torch.empty(2, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="uvg_engine.kernels"):
        for block in (8, 8, 16):
            _launch.launch(Kernel(), (1,), x, BLOCK=block)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "some_kernel on cpu (bfloat16, BLOCK=8)" in said[0] and "BLOCK=16" in said[1]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("capturing", [False, True])
def test_a_kernel_may_be_loaded_while_a_graph_is_captured(capturing, fails, monkeypatch):
    """cuDNN serves the calls before and refuses the captured one, which is then the first of ours."""
    mode, seen, error = [0], [], 0

    def exchange(pointer):
        mode[0], pointer._obj.value = pointer._obj.value, mode[0]
        return error

    class Kernel:
        __name__ = "some_kernel"

        def __getitem__(self, grid):
            return self.start

        def start(self, *args, **options):
            seen.append(mode[0])
            if fails:
                raise ValueError

    monkeypatch.setattr(_launch, "_driver", lambda: SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.version, "hip", None)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    with pytest.raises(ValueError) if fails else contextlib.nullcontext():
        _launch.launch(Kernel(), (1,), x)
    assert seen == [2 if capturing else 0] and mode == [0]
    error = 1
    with pytest.raises(RuntimeError, match="gives error 1"):
        _launch._exchange(_launch.ctypes.c_int(2))


def test_ops_trace_on_fake_cuda_tensors():
    """torch.compile sees shapes through the ops' fakes: no device and no backend."""
    with FakeTensorMode():
        x, gate = torch.empty(8, 16, device="cuda"), torch.empty(2, 16, device="cuda")
        spans = torch.empty(2, 2, dtype=torch.int32, device="cuda")
        out = ops.modulated_layer_norm(ops.gated_residual(x, x, gate, spans), gate, gate, spans)
        assert out.device.type == "cuda" and out.shape == x.shape
        dy, dgate = torch.ops.uvg.gated_residual_bwd(out, x, x, gate, spans)
        assert dy.device.type == dgate.device.type == "cuda" and dgate.shape == gate.shape
        with Calls() as calls:
            out, normed = ops.gated_residual_norm(x, x, gate, spans, gate, gate, spans)
        assert out.shape == normed.shape == x.shape and "gated_residual_norm" in calls.names


@pytest.mark.skipif(backend.interpreting(), reason="the interpreter serves CPU tensors")
def test_refusals_name_what_is_missing():
    x = torch.empty(3, 8)
    assert backend.refuses(x) == "tensors are on cpu"
    assert backend.refuses(x.to("meta")) == "tensors are on meta"
    with FakeTensorMode():
        on_gpu = torch.empty(3, 8, device="cuda")
    assert backend.refuses(on_gpu.double()) == "dtype torch.float64; have float32, bfloat16, float16"
    wide = torch.empty(1, backend.MAX_WIDTH + 1)
    assert backend.refuses_rows(wide) == f"width {backend.MAX_WIDTH + 1}; up to {backend.MAX_WIDTH}"


def test_triton_is_a_reason_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend._missing.cache_clear()
    try:
        with FakeTensorMode():
            assert backend.refuses(torch.empty(3, 8, device="cuda")) == "triton is not installed"
    finally:
        backend._missing.cache_clear()


def test_an_old_triton_is_refused_by_name(monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.5.1")
    backend._missing.cache_clear()
    try:
        with FakeTensorMode():
            assert backend.refuses(torch.empty(3, 8, device="cuda")) == "triton 3.5.1; from 3.6 on"
    finally:
        backend._missing.cache_clear()


def test_small_gpus_take_what_serves_sm_80(monkeypatch):
    for found, taken in (((12, 0), _launch.SM80), ((10, 0), _launch.SM100), ((8, 9), (8, 9))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        _launch._capability_of.cache_clear()
        assert _launch.capability_of(torch.device("cuda", 0)) == taken
    _launch._capability_of.cache_clear()


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    devices.capability.cache_clear()
    with FakeTensorMode():
        said = backend.refuses(torch.empty(3, 8, device="cuda"))
    devices.capability.cache_clear()
    assert said == "compute capability 7.5; from 8.0 on"


@pytest.mark.parametrize("capability", _launch.ALL)
def test_where_a_sample_lies_chooses_no_configuration(capability):
    """The engine gives a product the rows of one sample, wherever the batch has them. Their address tells Triton what
    accesses there may be only where the width does not: else all rows of a tensor have the alignment of its first."""
    for itemsize, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        for width in (*range(1, 140), 1536):
            rows = torch.empty(9, width, dtype=dtype)
            assert rows.data_ptr() % 16 == 0
            with _launch.recording(capability):
                asked = {(_head.wide(x), _head.by_pieces(x), _head.uses_descriptors(x)) for x in places(rows)}
                products = {moe_mlp._config(width, x, rows) for x in places(rows)}
                widths = {x[:, None].data_ptr() % 16 == 0 for x in places(rows)} if width % 16 == 0 else {True}
                heads = (x[:, None] for x in places(rows) if width <= 128)
                attention = {flash_attention._config(flash_attention.FORWARD, x, x) for x in heads}
            assert len(asked) == len(products) == 1 and widths == {True} and len(attention) <= 1, (itemsize, width)


def places(rows):
    """Rows of a sample that others may come before."""
    return [rows[first:] for first in range(8)]
