"""NVIDIA's occupancy calculator, compiled here and asked without a GPU."""

import pytest

from bench import cuda_launches, occupancy
from bench.occupancy import Launch, blocks_per_sm

pytestmark = pytest.mark.skipif(occupancy.missing() is not None, reason=str(occupancy.missing()))
CHIPS = [((8, 0), 167_936), ((9, 0), 233_472), ((10, 0), 233_472)]


@pytest.mark.parametrize("capability, shared", CHIPS)
def test_what_bounds_the_blocks(capability, shared):
    launches = {
        Launch(256, 64, 0): 4,  # registers: 2,048 a warp of 65,536
        Launch(256, 65, 0): 3,  # given out by 256
        Launch(32, 114, 512): 16,  # each quarter of a multiprocessor has its own
        Launch(256, 16, 0): 8,  # 64 warps
        Launch(32, 16, 0): 32,  # blocks
        Launch(1024, 128, 0): 0,  # more registers than there are
        Launch(128, 16, 60_000): shared // 61_440,  # shared memory, given out by 1,024 bytes beyond the system's 1,024
    }
    assert blocks_per_sm(capability, shared, list(launches)) == list(launches.values())


def test_a_chip_that_the_header_does_not_know_is_an_error():
    with pytest.raises(RuntimeError, match=r"^cuda_occupancy\.h must know capability \(1, 0\) and the launches, got "):
        blocks_per_sm((1, 0), 233_472, [Launch(32, 16, 0)])


def test_a_kernel_without_a_launch_is_an_error():
    with pytest.raises(
        ValueError, match=r"^kernel must be one whose launch stands in .*, got 'softmax: some_kernel<1>'$"
    ):
        cuda_launches.launch_of("softmax: some_kernel<1>")
