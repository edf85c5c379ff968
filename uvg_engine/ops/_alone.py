"""Whether a call is seen by nobody but the kernel: what torch tells of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode

# What tells that nobody looks on is private to torch. A torch without one of these dispatches every call.
_NEEDED = (
    (torch._C, "_any_requires_grad"),
    (torch._C, "_dispatch_keys"),
    (torch._C, "_get_dispatch_stack_at"),
    (torch._C, "_get_function_stack_at"),
    (torch._C, "_get_tracing_state"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C, "_len_torch_function_stack"),
    (getattr(torch._C, "_autograd", None), "_profiler_enabled"),
    (getattr(torch._C, "_functorch", None), "get_unwrapped"),
    (getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor"),
    (getattr(torch._C, "_functorch", None), "is_gradtrackingtensor"),
    (getattr(torch._C, "_functorch", None), "peek_interpreter_stack"),
    (forward_ad, "_current_level"),
    (_device, "DeviceContext"),
)
CAN_TELL = all(hasattr(place, name) for place, name in _NEEDED)
_PLAIN: set[int] = set()  # dispatch keys of CPU tensors that are nothing but memory
if CAN_TELL:  # names of this module: to look each up in torch costs as much as to call it
    from torch._C import (
        _dispatch_keys,
        _get_dispatch_stack_at,
        _get_function_stack_at,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack

    _PLAIN.add(_dispatch_keys(torch.empty(0, device="cpu")).raw_repr())
    with torch.inference_mode():
        _PLAIN.add(_dispatch_keys(torch.empty(0, device="cpu")).raw_repr())


def alone(args: tuple[Any, ...]) -> bool:
    """Whether nobody but the kernel has to see a call: no tracing, mode, transform or profiler, plain CPU tensors only.

    Such a call goes to the backend without torch's dispatcher, which costs more than a small kernel.
    """
    if (
        not CAN_TELL
        or is_compiling()
        or (_len_torch_dispatch_stack() and not _only_an_onlooker())
        or (_len_torch_function_stack() and not _only_defaults_to_cpu())
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if _dispatch_keys(x).raw_repr() not in _PLAIN:
                return False
        elif isinstance(x, Tensor):  # a subclass, which may have a __torch_function__
            return False
    return True


class Onlooker(TorchDispatchMode):
    """A mode of ours that lets a call be what it is without it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler at the first dispatch, 150 MB and 2 s, to keep it away from here."""
        return False


def _only_an_onlooker() -> bool:
    return _len_torch_dispatch_stack() == 1 and isinstance(_get_dispatch_stack_at(0), Onlooker)


def _only_defaults_to_cpu() -> bool:
    """Whether the one mode there is, is torch's own for a default device, and that is the CPU."""
    mode = _get_function_stack_at(0)
    return _len_torch_function_stack() == 1 and type(mode) is _device.DeviceContext and mode.device.type == "cpu"


def has_values(x: Tensor) -> bool:
    """Whether the host may read x's numbers now: memory of the CPU, whoever looks on, and no stand-in for a tensor."""
    return CAN_TELL and not is_compiling() and _dispatch_keys(x).raw_repr() in _PLAIN
