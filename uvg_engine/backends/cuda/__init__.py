"""The cuda backend: kernels in CUDA C++ for NVIDIA GPUs, a module for each op. There tensors are checked and made
ready; kernels see addresses. Tests run the same tables on CPU tensors by the simulator of csrc/sim."""

from __future__ import annotations

from uvg_engine.backends import Kernel
from uvg_engine.backends.cuda import gated_residual, modulated_layer_norm

TABLE = {
    "gated_residual": Kernel(gated_residual.forward, gated_residual.backward, gated_residual.refuses),
    "modulated_layer_norm": Kernel(
        modulated_layer_norm.forward, modulated_layer_norm.backward, modulated_layer_norm.refuses
    ),
}
