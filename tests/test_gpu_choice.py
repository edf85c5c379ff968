"""Which backend a call on a GPU is offered to first, and why: with tensors that only say that they are on one."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from uvg_engine import backends
from uvg_engine.backends import choice, cudnn, devices, flash_attn, flash_attn_3, native, triton
from uvg_engine.backends.cuda import _tensors
from uvg_engine.backends.cuda import linear_sample as cuda_linear_sample

LIBRARIES = (flash_attn, flash_attn_3)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, missing): a GPU of this capability, where every backend but `missing` is installed."""
    monkeypatch.delenv("UVG_BACKENDS", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def be(capability, *missing):
        monkeypatch.setattr(devices, "capability", lambda device: capability)
        monkeypatch.setattr(native, "why_no_driver", lambda: "not built" if "cuda" in missing else None)
        monkeypatch.setattr(triton, "_missing", lambda: "no triton" if "triton" in missing else None)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: "cudnn" not in missing)
        for library in LIBRARIES:
            name = library.__name__.rpartition(".")[2]
            found = (None, f"{name} is not installed") if name in missing else (library, None)
            monkeypatch.setattr(library, "_package", lambda found=found: found)

    return be


def attention(rows=4096, samples=1, spans=2, width=128, dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        q, k, v = (torch.empty(rows, 12, width, dtype=dtype, device=device) for _ in range(3))
        table = torch.empty(samples, spans, 2, dtype=torch.int32, device=device)
    return q, k, v, table, table, 0.1


def served(op, args):
    return backends.select(op, args)[0]


@pytest.mark.parametrize(
    "capability, order",
    [
        ((8, 0), ("flash_attn", "cuda", "triton", "cudnn")),
        ((8, 9), ("flash_attn", "cuda", "triton", "cudnn")),
        ((9, 0), ("flash_attn_3", "cudnn", "triton", "flash_attn", "cuda")),
        ((10, 0), ("cudnn", "triton", "flash_attn", "cuda")),
        ((10, 3), ("cudnn", "triton", "flash_attn", "cuda")),
        ((12, 0), ("flash_attn", "cuda", "triton", "cudnn")),
    ],
)
def test_attention_goes_to_who_suits_the_chip(gpu, capability, order):
    """Each in turn serves where those before it are missing."""
    args = attention()
    for place, name in enumerate(order):
        gpu(capability, *order[:place])
        assert served("flash_attention", args) == name
        assert set(backends.asked("flash_attention", args)) == set(backends.ORDER)


@pytest.mark.parametrize("missing", [(), ("flash_attn_3",), ("flash_attn_3", "cudnn"), ("flash_attn", "cudnn")])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_neighbours_change_no_choice(gpu, capability, missing):
    """Same request, same backend: rows, samples and spans of the batch do not count."""
    gpu(capability, *missing)
    batches = [attention(rows, samples, spans) for rows in (7, 4096) for samples in (1, 8) for spans in (1, 2)]
    assert len({served("flash_attention", args) for args in batches}) == 1


def test_the_shape_decides_who_is_left(gpu):
    gpu((9, 0))
    assert served("flash_attention", attention(width=136)) == "flash_attn_3"
    gpu((9, 0), "flash_attn_3")
    assert served("flash_attention", attention()) == "cudnn"
    assert served("flash_attention", attention(dtype=torch.float32)) == "triton"
    assert served("flash_attention", attention(dtype=torch.float64)) == "reference"
    gpu((9, 0), "flash_attn_3", "triton")
    assert served("flash_attention", attention(width=256)) == "flash_attn"
    assert served("flash_attention", attention(width=264)) == "reference"


def sample_args():
    with FakeTensorMode():
        x, weight = (torch.empty(rows, 1536, dtype=torch.bfloat16, device="cuda") for rows in (256, 4096))
        bias, ids = torch.empty(4096, device="cuda"), torch.empty(256, dtype=torch.int64, device="cuda")
    return x, weight, bias, ids, ids, ids, 1.0


@pytest.mark.parametrize(
    "capability, name", [((8, 0), "cuda"), ((9, 0), "triton"), ((10, 0), "triton"), ((12, 0), "cuda")]
)
def test_the_head_goes_to_the_product_that_suits_the_chip(gpu, capability, name):
    gpu(capability)
    assert served("linear_sample", sample_args()) == name
    gpu(capability, "triton")
    assert served("linear_sample", sample_args()) == "cuda"


def test_an_op_without_a_rule_has_the_usual_order(gpu):
    gpu((9, 0))
    with FakeTensorMode():
        logits = torch.empty(3, 8, device="cuda")
    assert backends.asked("moe_route", (logits, 2)) == backends.ORDER and served("moe_route", (logits, 2)) == "cuda"
    assert backends.why("moe_route", logits, 2).splitlines()[1] == (
        "because: moe_route on sm_90: the most specialised first"
    )


def test_why_tells_order_reason_and_refusals(gpu):
    gpu((9, 0), "flash_attn_3", "cudnn")
    args = attention()
    assert backends.why("flash_attention", *args).splitlines() == [
        "asked: flash_attn_3, cudnn, triton, flash_attn, cuda, cpu, sdpa, reference",
        "because: flash_attention of usual heads on sm_90 (untuned): FlashAttention-3 reaches 75 % of an H100's peak, "
        "cuDNN comes near it, FlashAttention-2 reaches 35 % (arXiv 2407.08608); Triton's kernel has wgmma, the CUDA "
        "kernel mma.sync",
        "flash_attn_3: flash_attn_3 is not installed",
        f"cudnn: torch {torch.__version__} has no cuDNN",
        "served by triton",
    ]
    assert backends.explain("flash_attention", *args)["cuda"] is None


def test_why_on_the_cpu_and_of_what_nobody_serves():
    x = torch.zeros(3, 2)
    assert backends.why("moe_route", x, 1).splitlines()[1] == "because: moe_route on cpu: the most specialised first"
    with backends.force("sdpa"):
        assert backends.why("moe_route", x, 1).splitlines() == [
            "asked: sdpa",
            "because: forced",
            "sdpa: backend sdpa has no kernel for moe_route",
            "served by none of them",
        ]
    with pytest.raises(ValueError, match=r"^op must be one of .*, got 'softmax'$"):
        backends.why("softmax", x)


def test_the_environment_and_force_go_before_the_table(gpu, monkeypatch):
    gpu((9, 0))
    args = attention()
    monkeypatch.setenv("UVG_BACKENDS", "cuda,flash_attn_3,reference")
    assert served("flash_attention", args) == "cuda"
    assert backends.why("flash_attention", *args).splitlines()[:2] == [
        "asked: cuda, flash_attn_3, reference",
        "because: UVG_BACKENDS",
    ]
    with backends.force("triton"):
        assert served("flash_attention", args) == "triton"
    gpu((9, 0), "triton")
    with backends.force("triton"), pytest.raises(backends.BackendRefused, match=r"triton: no triton$"):
        backends.select("flash_attention", args)


def test_a_gpu_of_another_maker_has_the_usual_order(gpu, monkeypatch):
    gpu((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.3")
    args = attention()
    assert backends.asked("flash_attention", args) == backends.ORDER and served("flash_attention", args) == "triton"
    said = backends.explain("flash_attention", *args)
    assert {said[name] for name in ("flash_attn", "flash_attn_3", "cudnn")} == {
        "the library's kernels are for NVIDIA GPUs"
    }


@pytest.mark.parametrize("name", ["cuda", "triton", "flash_attn", "flash_attn_3", "cudnn"])
def test_an_old_gpu_is_refused_by_everyone(gpu, name):
    gpu((7, 5))
    assert backends.explain("flash_attention", *attention())[name] == "compute capability 7.5; from 8.0 on"
    assert served("flash_attention", attention()) == "reference"


def test_what_the_libraries_refuse(gpu, monkeypatch):
    gpu((8, 0))
    said = backends.explain("flash_attention", *attention())
    assert said["flash_attn_3"] == "compute capability 8.0; have 9.0" and said["flash_attn"] is None
    for library, widest in ((flash_attn, 256), (flash_attn_3, 256), (cudnn, 128)):
        refuses = library.refuses
        assert refuses(*attention(width=100)) == f"head width 100; have multiples of 8 up to {widest}"
        assert refuses(*attention(width=widest + 8)) == f"head width {widest + 8}; have multiples of 8 up to {widest}"
        assert refuses(*attention(dtype=torch.float32)) == "dtype torch.float32; have bfloat16, float16"
        assert refuses(*attention(device="cpu")) == "tensors are on cpu"
    gpu((8, 0), "cudnn")
    assert cudnn.refuses(*attention()) == f"torch {torch.__version__} has no cuDNN"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for library in (flash_attn, flash_attn_3, cudnn):
        assert library.refuses(*attention()).startswith("a CUDA graph is being captured")
    assert served("flash_attention", attention()) == "cuda"


def test_rows_that_a_gpu_cannot_keep_are_refused_by_name(gpu, monkeypatch):
    """Of 99 KiB of shared memory (sm_86, sm_89, sm_120) a backward's two rows get half each."""
    gpu((8, 9))
    with FakeTensorMode():
        rows = [torch.empty(3, width, dtype=torch.bfloat16, device="cuda") for width in (25344, 25345)]
    monkeypatch.setattr(devices, "shared_limit", lambda device: 99 << 10)
    assert [_tensors.refuses_rows(x) for x in rows] == [None, "width 25345 in torch.bfloat16; up to 25344 here"]
    monkeypatch.setattr(devices, "shared_limit", lambda device: 227 << 10)
    assert _tensors.refuses_rows(rows[1]) is None


def test_a_torch_that_tells_no_limit_gets_the_least(monkeypatch):
    devices.shared_limit.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    assert devices.shared_limit(torch.device("cuda", 0)) == 101_376
    devices.shared_limit.cache_clear()


def test_every_rule_names_backends_ops_and_says_what_nobody_measured():
    for rule in choice._RULES:
        assert set(rule.first) <= set(backends.ORDER) and rule.since < rule.until
        assert all(rule.op in backends.table(name) for name in rule.first) and rule.reason


def test_cuda_refuses_more_rows_than_a_grid_has(monkeypatch):
    """So that another backend serves them; the launch itself would fail."""
    rule, x = backends.table("cuda")["linear_sample"].refuses, torch.empty(1, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(cuda_linear_sample, "refuses_tensors", lambda *tensors, dtypes: None)
    assert rule(x.expand(65535 * 64, 8)) is None
    assert rule(x.expand(65535 * 64 + 1, 8)) == "4194241 rows; up to 4194240"
