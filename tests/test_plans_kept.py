"""Which plans of calls there are: of this call and no other, as long as they do, and not too many of them."""

import subprocess
import sys

import pytest

from uvg_engine.ops import _plans

pytestmark = pytest.mark.skipif(not _plans._begin(), reason="no native core, or a torch without DLPack's functions")


def test_a_plan_does_not_import_the_compiler():
    """150 MB and 2 s of the second call of a process."""
    lines = (
        "import sys, torch",
        "from uvg_engine import ops",
        "h = torch.ones(2, 3)",
        "assert all(torch.equal(ops.gated_residual(h, h), h + h) for _ in range(3))",
        "assert 'torch._dynamo' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
