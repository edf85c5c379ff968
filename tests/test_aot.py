"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, without spills, with the instructions meant.

`bench/aot.py` compiles; what each kernel must show stands in the `AOT_CASES` of its module. Those marked `tested` are
compiled here; that the page was written for all of them as they are, without a fault, its digest tells.
"""

import ast
import importlib
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from uvg_engine.backends import triton as backend

pytest.importorskip("triton", reason="triton is not installed")
if backend.interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import aot, aot_rocm, occupancy, roofline
from uvg_engine.kernels import _configs, _launch

CAPABILITIES = sorted(aot.SHARED_LIMIT)
PINNED = re.search(r"^triton==(\S+)", (aot.KERNELS.parent / "constraints.txt").read_text(), re.M).group(1)
FOUND = importlib.import_module("triton").__version__


@pytest.fixture(scope="module")
def pool():
    workers = min(len(CAPABILITIES), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.skipif(FOUND != PINNED, reason=f"what spills depends on Triton: looked at with {PINNED}, here is {FOUND}")
@pytest.mark.parametrize("op", aot.ops())
def test_kernels_compile_well(pool, op):
    done = [pool.submit(aot.compile_op, op, capability, every=False) for capability in CAPABILITIES]
    compiled = [one for job in done for one in job.result()]
    assert [fault for one in compiled for fault in one.faults()] == []
    tree = ast.parse((aot.KERNELS / f"{op}.py").read_text())
    named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")}
    for capability in CAPABILITIES:
        assert named <= {one.kernel for one in compiled if one.capability == capability}, "AOT_CASES leave kernels out"
    if occupancy.missing() is None:
        assert_multiprocessors_are_full(compiled)


def assert_multiprocessors_are_full(compiled):
    """No chip holds more programs of a persistent kernel than are started for it; and one holds so many."""
    most = {}
    for one in (one for one in compiled if one.held):
        chip = next(chip for chip in roofline.CHIPS if chip.capability == one.capability)
        held = roofline.blocks_per_sm(one, chip)
        assert held <= one.held, f"{one.where}: {held} are held"
        most[one.kernel, one.held] = max(held, most.get((one.kernel, one.held), 0))
    assert most == {key: key[1] for key in most}


@pytest.mark.skipif(occupancy.missing() is not None, reason=str(occupancy.missing()))
@pytest.mark.parametrize("held, match", [(1, "2 are held"), (3, "some_kernel', 3")])
def test_a_multiprocessor_that_is_not_full_is_found(held, match):
    with pytest.raises(AssertionError, match=match):
        assert_multiprocessors_are_full([made(registers=128, held=held)])
    assert_multiprocessors_are_full([made(registers=128, held=2), made(registers=255, held=2), made(registers=16)])


@pytest.mark.parametrize("op", ["moe_mlp", "window_attention"])
def test_persistent_kernels_tell_their_tiles(op):
    """What the page divides by: programs are as many as the chip holds, here three multiprocessors."""
    for case in aot.cases(op):
        with _launch.recording(_launch.SM90) as launches:
            case.call()
        found = [case.tiles[launch.name](launch) // launch.grid[0] for launch in launches if launch.name in case.tiles]
        assert found and min(found) > 4


def test_every_op_that_the_backend_serves_has_cases():
    assert set(backend.TABLE) <= set(aot.ops())


@pytest.mark.parametrize("op", aot.ops())
def test_cases_are_of_every_dtype(op):
    """By the narrowest floats of a case: statistics and parameters are fp32 in all of them."""
    found = set()
    for case in aot.cases(op):
        with _launch.recording(_launch.SM80) as launches:
            case.call()
        dtypes = {x.dtype for launch in launches for x in _launch.tensors_of(launch.args) if x.is_floating_point()}
        found |= dtypes - {torch.float32} or dtypes
    assert found >= set(backend._DTYPES)


def tables():
    """Every table of configurations in kernels/, by name."""
    modules = [importlib.import_module(f"uvg_engine.kernels.{path.stem}") for path in sorted(aot.KERNELS.glob("*.py"))]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, _configs.Table)]
    return {table.name: table for table in found}


def test_cases_reach_every_configuration():
    """Whatever a table may answer on a chip, a case that is compiled here asks for it there."""
    reached = set()

    def note(table, key, config):
        reached.add((table.name, *key))
        return config

    for case in (case for op in aot.ops() for case in aot.cases(op) if case.tested):
        for capability in case.capabilities:
            with _launch.recording(capability), _configs.answering(note):
                case.call()
    can = {
        (name, capability, *key[1:])
        for name, table in tables().items()
        for key in table.entries
        for capability in _launch.ALL
        if key[0] <= capability
    }
    assert can and sorted(map(str, can - reached)) == []


def test_tables_bear_the_names_of_their_places():
    for name in tables():
        module, variable = name.split(".")
        assert getattr(importlib.import_module(f"uvg_engine.kernels.{module}"), variable).name == name


@pytest.mark.skipif(FOUND != PINNED, reason=f"the page tells of Triton {PINNED}, here is {FOUND}")
def test_the_page_was_written_for_the_kernels_as_they_are():
    """Else: `python -m bench.aot --write docs/gpu_static_report.md`; where a kernel has a fault it writes nothing."""
    page = (aot.KERNELS.parent / "docs/gpu_static_report.md").read_text()
    assert f"`{aot.digest()}`" in page


@pytest.mark.skipif(FOUND != PINNED, reason=f"the page tells of Triton {PINNED}, here is {FOUND}")
def test_the_page_shows_no_spill_in_any_case():
    """Of the cases that are not compiled here too: with the digest these are the kernels as they are."""
    page = (aot.KERNELS.parent / "docs/gpu_static_report.md").read_text()
    triton = page[page.index("<!-- triton: begin -->") : page.index("<!-- triton: end -->")]
    rows = re.findall(r"^\| `\w+_kernel` \| (.+?) \| (\d+) \| \d+ \| (\d+) \|", triton, re.M)
    assert len(rows) == triton.count("_kernel`") and {spills for *_, spills in rows} == {"0"}
    cases = {(case.name, f"{a}{b}") for op in aot.ops() for case in aot.cases(op) for a, b in case.capabilities}
    assert {(case, chip) for case, chip, _ in rows} == cases


def test_kernels_compile_for_rocm():
    """One op, for time; `python -m bench.aot_rocm` goes through all."""
    compiled = aot_rocm.compile_op("moe_route")
    assert {one.kernel for one in compiled} == {"moe_route_fwd_kernel", "moe_route_bwd_kernel"}
    assert all(one.registers > 0 and not one.scratch and not one.faults() for one in compiled)
    (fault,) = aot_rocm.Compiled("some_kernel", "case", 1, 0, 65_537).faults()
    assert fault == "some_kernel (case) wants 65537 bytes of shared memory of 65536"


def test_the_page_names_kernels_that_are_there():
    page = (aot.KERNELS.parent / "docs/gpu_static_report.md").read_text()
    named = set(re.findall(r"^\| `(\w+_kernel)` \|", page, re.M))
    sources = "".join(path.read_text() for path in aot.KERNELS.glob("*.py"))
    assert named and [name for name in sorted(named) if f"def {name}(" not in sources] == []


def made(**changes):
    given = {
        **dict(op="op", case="case", kernel="some_kernel", capability=(8, 0), grid=(4, 2), options={"num_warps": 8}),
        **dict(registers=64, stack=0, shared=1000, ptx="", cubin=b"", bytes_moved=1, flops=0.0, expects=()),
        "tiles": 8,
    }
    return aot.Compiled(**(given | changes))


WIDE, NARROW = "ld.global.v4.b32 { }; st.global.v2.b64 [ ];", "@%p1 ld.global.L1::evict_first.b16 { };"


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"stack": 8}, "spills: 8 bytes"),
        ({"shared": 101_377}, "101377 bytes of shared memory"),
        ({"expects": ("dot",)}, "no mma"),
        ({"capability": (10, 0), "expects": ("mma",)}, "no tcgen05"),
        ({"ptx": "mma.sync.aligned"}, "does not tell of"),
        ({"capability": (9, 0), "expects": ("dot",), "ptx": "mma.sync.aligned"}, "no wgmma"),
        ({"capability": (10, 0), "expects": ("dot",), "ptx": "mma.sync.aligned"}, "no tcgen05"),
        ({"capability": (9, 0), "expects": ("tma",)}, "no cp"),
        ({"expects": ("wide",), "ptx": 10 * NARROW + WIDE}, "62% of its bytes"),
        ({"expects": ("rounded",), "ptx": "mul.rn.f32 %f1; add.f32 %f2;"}, "may fuse a product with a sum: add.f32"),
    ],
)
def test_faults_are_found(changes, match):
    (fault,) = made(**changes).faults()
    assert match in fault and "some_kernel (case) on sm_" in fault


def test_what_is_right_has_no_fault():
    assert list(made(expects=("wide", "tma"), ptx=WIDE).faults()) == []
    assert list(made(capability=(10, 0), expects=("mma",), ptx="mma.sync.aligned").faults()) == []


KINDS = "bf16", "tf32"


@pytest.mark.skipif(occupancy.missing() is not None, reason=str(occupancy.missing()))
def test_occupancy_and_roof_by_hand():
    chip = roofline.CHIPS[0]
    assert roofline.blocks_per_sm(made(registers=64), chip) == 4  # 65,536 registers by 8 warps of 2,048
    assert roofline.blocks_per_sm(made(registers=65), chip) == 3  # rounded up to 2,304 a warp
    assert roofline.blocks_per_sm(made(registers=16), chip) == 8  # 64 warps
    assert roofline.blocks_per_sm(made(registers=16, shared=60_000), chip) == 2
    assert roofline.predicted(made(bytes_moved=2_039_000_000), chip) == (pytest.approx(1e-3), "memory")
    assert roofline.predicted(made(flops=19.5e9), chip) == (pytest.approx(1e-3), "FMA units")
    bf16, tf32 = (made(flops=312e9, ptx=f"mma.sync.aligned.m16n8k8.row.col.f32.{kind}.{kind}.f32") for kind in KINDS)
    assert roofline.predicted(bf16, chip) == (pytest.approx(1e-3), "tensor cores")
    assert roofline.predicted(tf32, chip) == (pytest.approx(2e-3), "tensor cores in TF32")
    assert roofline.predicted(made(), chip)[1] == "launch"
