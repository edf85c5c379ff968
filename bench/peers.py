"""The one table of peers: which libraries ops are compared with, why one is missing, and how it takes a torch peer.

A case writes a peer in plain torch; the compilers (inductor, OpenVINO) take that same code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import gpu_peers
from bench.case import FORWARD, PASSES, Peer

Missing = Callable[[str], "str | None"]


@dataclass(frozen=True)
class Library:
    """missing: why it cannot be used on a device, or None. passes: what it can do. adapt: a compiler's, for a pass."""

    missing: Missing = lambda device: None
    passes: tuple[str, ...] = PASSES
    adapt: Callable[[Peer, str], Peer] | None = None


def _needs(module: str, device: str | None = None) -> Missing:
    """`module` must be installed and, where given, the benchmark run on `device`."""

    def missing(on: str) -> str | None:
        if device and on != device:
            return f"runs on {device} only"
        return None if importlib.util.find_spec(module) else f"{module} is not installed"

    return missing


def _inductor(peer: Peer, what: str) -> Peer:
    """torch.compile; weights are frozen into the code for inference."""
    torch.compiler.reset()
    options: dict[str, Any] = {"freezing": True} if what == FORWARD else {}
    with torch.no_grad() if what == FORWARD else torch.enable_grad():
        module = peer.function.eval() if isinstance(peer.function, nn.Module) else peer.function
        compiled = torch.compile(module, dynamic=False, options=options)
        if what == FORWARD:
            compiled(*(x.detach() if isinstance(x, Tensor) else x for x in peer.inputs))
    return replace(peer, function=compiled, weights=peer.parameters)


def _openvino(peer: Peer, what: str) -> Peer:
    """Converted from torch and compiled for the CPU with torch's number of threads, weights as constants."""
    import openvino

    inputs = tuple(x.detach() for x in peer.inputs)
    converted = openvino.convert_model(_Traceable(peer.function).eval(), example_input=inputs)
    converted.reshape({place: list(x.shape) for place, x in enumerate(inputs)})
    bf16 = any(x.dtype == torch.bfloat16 for x in (*inputs, *peer.parameters))
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
    }
    request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()
    for place, x in enumerate(inputs):
        request.set_input_tensor(place, _to_openvino(x))

    def infer(*inputs: Tensor) -> tuple[Tensor, ...]:
        request.infer()
        return tuple(_from_openvino(tensor) for tensor in request.output_tensors)

    single = len(converted.outputs) == 1
    return Peer(infer, peer.inputs, lambda outs: peer.restore(outs[0] if single else outs))


class _Traceable(nn.Module):
    """A function as the module that OpenVINO's converter wants."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        result = self.function(*inputs)
        return tuple(result) if isinstance(result, list) else result


def _to_openvino(x: Tensor) -> Any:
    """The same memory as an OpenVINO tensor; numpy knows no bf16."""
    import openvino

    x = x.contiguous()
    if x.dtype == torch.bfloat16:
        return openvino.Tensor(x.view(torch.int16).numpy(), openvino.Shape(list(x.shape)), openvino.Type.bf16)
    return openvino.Tensor(x.numpy(), shared_memory=True)


def _from_openvino(tensor: Any) -> Tensor:
    if tensor.element_type.get_type_name() == "bf16":
        return torch.from_numpy(tensor.data.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(tensor.data)


def _needs_function(name: str) -> Missing:
    """torch.nn.functional must have it."""
    return lambda device: None if hasattr(functional, name) else f"torch {torch.__version__} has no {name}"


PEERS = {
    "torch": Library(),
    "full": Library(passes=(FORWARD,)),  # our own op or block, not in bytes, beside the one in bytes
    "torch.linear_cross_entropy": Library(_needs_function("linear_cross_entropy")),
    "inductor": Library(adapt=_inductor),
    "openvino": Library(_needs("openvino", "cpu"), (FORWARD,), _openvino),
    "diffusers": Library(_needs("diffusers")),
    "flash_attn.flash_attn_func": Library(gpu_peers.package_on_cuda("flash_attn")),
    "torch.cudnn": Library(gpu_peers.on_cuda),
    "grouped_mm": Library(gpu_peers.grouped_mm_missing),
    "flex_attention": Library(gpu_peers.on_cuda),
    "liger": Library(gpu_peers.package_on_cuda("liger_kernel"), (FORWARD,)),
    "liger.norm": Library(gpu_peers.package_on_cuda("liger_kernel")),
}
