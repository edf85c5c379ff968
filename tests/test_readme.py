"""The Python of the README, the quickstart and the sampling page runs as it stands, with the model that ships; the
training page's files are training files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from uvg_engine.media import write_video
from uvg_engine.training import TrainConfig, Trainer
from uvg_engine.training.data import DigitsDataset, export

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


def test_python_of_the_sampling_page_runs(tmp_path):
    """Its blocks go on from one another; the clip that they caption is there."""
    write_video(tmp_path / "seven.mp4", DigitsDataset().item(0).frames, 4.0)
    code = "\n".join(blocks("docs/sampling.md"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    assert sorted(said[:3]) == [["0", "GenerateResult"], ["1", "CaptionResult"], ["2", "JointResult"]]
    assert sorted(said[3:]) == [["2", "CaptionResult"], ["3", "JointResult"]]  # seeds; the first is cancelled


def test_the_training_page_shows_a_training_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export("train", 2, Path("clips"))
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/training.md").read_text(), re.M | re.S)
    trainer = Trainer(TrainConfig.from_dict(yaml.safe_load(text)), "run")
    assert [stage.steps for stage in trainer.config.stages] == [4000, 1000, 5000]
    assert trainer.dataset.clip_shape == (8, 64, 64)
