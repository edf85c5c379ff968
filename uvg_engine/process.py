"""What a program that does nothing but run the engine asks of its own process. `uvg` and `bench` do; the library alone
never does, since it would act on the code of others too."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_BLOCKS = (1 << 30, 1 << 25)  # bytes; older versions of glibc take the second alone


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors on the CPU give back, for the next ones, whatever their size.

    Otherwise glibc returns large blocks to the system, and a new tensor costs a page fault for every 4 KiB that it
    touches: 4 % of a block's forward, 5 to 7 % with its backward (AGENTS.md). It holds for the whole process from now
    on, which then keeps as much memory as it ever needed at once; there is no way back. Returns whether it was done:
    False without glibc, and where the environment says UVG_KEEP_MEMORY=0. Source: mallopt(3).
    """
    if os.environ.get("UVG_KEEP_MEMORY") == "0" or sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    taken = any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST_BLOCKS)
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and taken


def wait_briefly() -> bool:
    """Let threads that wait for one another (libgomp, which torch brings) sleep after some 10,000 turns.

    By default they turn far longer: no gain on a quiet machine, and where other work takes the cores most of the time
    is lost to it (docs/cli.md). Only before torch is imported, and only where the environment says nothing about it
    (OMP_WAIT_POLICY, GOMP_SPINCOUNT). Returns whether it was done. Source: libgomp's manual.
    """
    if "torch" in sys.modules or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return False
    os.environ["GOMP_SPINCOUNT"] = "10000"
    return True
