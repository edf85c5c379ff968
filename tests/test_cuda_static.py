"""What nvcc made of the CUDA kernels, looked at without a GPU: registers, spills, tensor cores, width of accesses."""

from __future__ import annotations

import re

import pytest

from bench import cuda_static, occupancy
from uvg_engine.backends import native

pytestmark = [
    pytest.mark.skipif(native.cuda() is None, reason=str(native.why_not_cuda())),
    pytest.mark.skipif(cuda_static.tool() is None, reason="no cuobjdump here (extra cuda-build)"),
]


@pytest.fixture(scope="module")
def kernels():
    return cuda_static.kernels()


def test_every_arch_has_every_kernel(kernels):
    archs = {f"sm_{arch}" for arch in native.info()["cuda"]["archs"].split(",")}
    by_name = {name: {k.arch for k in kernels if k.name == name} for name in {k.name for k in kernels}}
    assert by_name and {name for name, found in by_name.items() if found != archs} == set()


def test_nothing_is_spilled(kernels):
    spilled = [k for k in kernels if k.instructions["LDL"] or k.instructions["STL"] or k.stack]
    assert spilled == []


def test_products_run_on_tensor_cores(kernels):
    mine = [k for k in kernels if re.search(r"flash_attention.*(forward|dq|dkv)_kernel|weigh_kernel", k.name)]
    assert {k.name.split(":")[0] for k in mine} >= {"flash_attention", "linear_sample"}
    for k in mine:
        assert k.instructions["HMMA"] and k.instructions["LDSM"] and k.instructions["LDGSTS"], k.name


def test_rows_move_16_bytes_at_a_time(kernels):
    """The instantiations for aligned rows; the others take single elements."""
    norms = ("modulated_layer_norm: ", "gated_residual: ", "gated_residual_norm: ", "qk_norm_rope: ")
    row_ops = (*norms, "moe_dispatch: ", "moe_combine: ")
    wide = [k for k in kernels if k.name.startswith(row_ops) and k.vector and k.vector > 1 and "column" not in k.name]
    assert {k.name.split(":")[0] + ": " for k in wide} == set(row_ops)
    for k in wide:
        assert k.instructions["LDG.128"] and k.instructions["STG.128"], k.name


@pytest.mark.skipif(occupancy.missing() is not None, reason=str(occupancy.missing()))
def test_as_many_blocks_fit_as_are_meant(kernels):
    """Registers and shared memory, by NVIDIA's calculator, launched as for the published model."""
    held = cuda_static.occupancies(kernels)
    crowded = [(k.name, k.arch, k.meant, n) for k, n in zip(kernels, held, strict=True) if n < k.meant]
    assert crowded == [] and {k.meant for k in kernels} >= {2, 4}


def test_registers_leave_room_for_the_blocks_that_are_meant(kernels):
    """__launch_bounds__: two blocks of attention or of the head on a multiprocessor, four of sums, two of rows."""
    for k in kernels:
        limit = 255 if "flash_attention" in k.name or "weigh_kernel" in k.name else 128  # of 128 threads
        assert k.registers <= limit, (k.name, k.arch, k.registers)
