"""Peak memory of a call: the resident set of a process of its own, over what it held before the call. Linux only.

It counts whatever asks for memory, torch or not. The C library is told to give freed memory back at once, and the call
has run before, so that neither caches nor compilers count.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes
ROOT = Path(__file__).resolve().parents[1]


def extra_memory(call: Callable[[], Any]) -> float:
    """MB (10^6 bytes) that the second call needs at its peak."""
    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1e6


def alone(module: str, function: str, *arguments: Any) -> Any:
    """What `module.function(*arguments)` returns, computed in a process of its own; all of it goes through JSON."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.memory", module, function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {field}: memory is measured on Linux only")
    return 1024 * int(found.group(1))


if __name__ == "__main__":
    print(json.dumps(getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*json.loads(sys.argv[3]))))
