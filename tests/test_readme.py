"""The README's and the quickstart's Python runs as it stands, with the model that ships."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/quickstart.md")


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


BLOCKS = [(page, number, code) for page in PAGES for number, code in enumerate(blocks(page))]


def test_readme_shows_the_api_in_about_ten_lines():
    (code,) = blocks("README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("page, number, code", BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_python_of_the_page_runs(page, number, code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "write_video" in code:
        assert (tmp_path / "seven.mp4").stat().st_size > 0
        said = done.stdout.strip().splitlines()
        assert len(said) == code.count("print(") + 1 and all(
            line.strip() for line in said
        )  # one of them in a loop of 2
