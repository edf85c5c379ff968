"""A wheel of this checkout in fresh environments with other versions of torch and no compiler: does it work there?

`python -m bench.wheel_check 2.14.1 2.12.1` builds the wheel, makes an environment for each version in a temporary
folder (torch's wheels bring GBs of CUDA libraries), and prints what each says of itself. Exits 1 where one fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import torch
from uvg_engine import Engine, backends, ops
from uvg_engine.backends import native

assert native.cpu() is not None, native.why_not()
spans = torch.tensor([[[0, 50]]], dtype=torch.int32)
for dtype, slack in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    q = torch.randn(50, 2, 64, dtype=dtype, requires_grad=True)
    results = []
    for backend in ("cpu", "reference"):
        with backends.force(backend):
            out = ops.flash_attention(q, q, q, spans, spans)[0]
            results.append((out, torch.autograd.grad(out.float().square().sum(), q)[0]))
    for ours, truth in zip(*results):
        assert (ours - truth).abs().max() <= slack * truth.abs().max()
video = Engine.from_pretrained("digits").generate("a red seven moving right, fast", seeds=1)[0]
print("torch", torch.__version__, "instruction set", native.info()["cpu"]["isa"], "frames", tuple(video.frames.shape))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="of torch")
    versions = parser.parse_args().versions
    with tempfile.TemporaryDirectory(prefix="uvg-wheel-") as folder:
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
        subprocess.run(build, check=True, env=os.environ | {"UVG_NATIVE": "1"})
        (wheel,) = Path(folder).glob("*.whl")
        print(wheel.name, flush=True)
        return int(not all([works(wheel, Path(folder, version), version) for version in versions]))


def works(wheel: Path, place: Path, version: str) -> bool:
    """Whether the wheel does its work beside torch of this version; tells."""
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = str(place / "bin" / "python")
    env = {name: value for name, value in os.environ.items() if not name.startswith("UVG_")}
    env["PATH"] = str(place / "bin")  # no compiler
    install = [python, "-m", "pip", "install", "-q", "--no-cache-dir", f"torch=={version}", str(wheel)]
    for command, folder in ((install, ROOT), ([python, "-W", "ignore", "-c", CHECK], place)):
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"torch {version}: failed\n{done.stdout}{done.stderr}", flush=True)
            return False
    print(done.stdout.strip(), flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
