"""How the CUDA kernels are launched at the widths of the published model: threads and shared memory of a block.

Said once more beside csrc/cuda, for the static report: what a launcher asks for shows only when it runs. In the
simulator it does, and tests/ops/test_cuda_simulator.py holds the two against each other.
"""

from __future__ import annotations

import re

WIDTH = 1536  # of a row, in the 1.3B model
ROW_WARPS, ROW_SHARED = 8, 48 << 10  # kRowWarps, kRowSharedBytes of csrc/cuda/rows.h
_KEPT = {  # rows that a warp keeps in shared memory
    "gated_residual_norm: forward_kernel": 1,
    "modulated_layer_norm: forward_kernel": 1,
    "modulated_layer_norm: backward_kernel": 2,
    "qk_norm_rope: forward_kernel": 1,
    "qk_norm_rope: backward_kernel": 2,
}
_TILES = {  # rows of shared tiles, and fp32 beside them
    "flash_attention: forward_kernel": (64 + 2 * 2 * 64, 0),
    "flash_attention_backward: dq_kernel": (2 * 64 + 2 * 2 * 32, 0),
    "flash_attention_backward: dkv_kernel": (2 * 64 + 2 * 2 * 32, 2 * 2 * 32),
}
_FIXED = {  # threads, bytes
    "flash_attention_backward: delta_kernel": (128, 0),
    "linear_sample: weigh_kernel": (128, 2 * 2 * (64 + 64 * 2) * 64),
    "linear_sample: pick_kernel": (256, 0),
    "moe_combine: forward_kernel": (512, 0),
    "moe_dispatch: backward_kernel": (512, 0),
    "moe_dispatch: forward_kernel": (512, 2 * 1024 * 4),
    "flow_noise: noise_kernel": (256, 0),
    "flow_step: step_kernel": (256, 0),
    "column_totals_kernel": (128, 0),
}


def launch_of(kernel: str, width: int = WIDTH) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a block of the kernel, named as in `cuda_static`; rows are `width` wide.

    Raises ValueError on a kernel that stands in no table here.
    """
    stem, _, arguments = kernel.partition("<")
    if stem in _FIXED:
        return _FIXED[stem]
    element = 4 if arguments.startswith("float") else 2
    if stem in _TILES:
        rows, floats = _TILES[stem]
        head = int(re.findall(r"(\d+)>$", arguments)[0])
        return 128, 2 * head * rows + 4 * floats
    if "column_partials_kernel" in stem:
        vector = int(re.findall(r"(\d+)>$", arguments)[0])
        parts = 2 if re.match(r"(Modulation|Affine)Terms", arguments) else 1
        return 128, 4 * 4 * parts * vector * 32
    if re.search(r": (forward|backward)_kernel$", stem):
        return row_launch(_KEPT.get(stem, 0) * element * width)
    raise ValueError(f"kernel must be one whose launch stands in bench/cuda_launches.py, got {kernel!r}")


def row_launch(kept: int) -> tuple[int, int]:
    """As many warps as keep `kept` bytes each, up to ROW_WARPS."""
    warps = ROW_WARPS
    while warps > 1 and kept * warps > ROW_SHARED:
        warps //= 2
    return 32 * warps, kept * warps
