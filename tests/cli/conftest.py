"""A model of random weights that makes the clips of the digits world in no time, and `uvg` run in this process."""

import re
from dataclasses import dataclass

import pytest
import torch

from uvg_engine.cli import main
from uvg_engine.media import HashTextEncoder, PixelCodec, WordTokenizer
from uvg_engine.model import UniViGU, UniViGUConfig
from uvg_engine.sampling import Engine
from uvg_engine.training.data.digits_text import vocabulary

PROGRESS = re.compile(r"[a-z]+: \d+/\d+\b")
SIZES = {"heads": 2, "head_dim": 16, "in_channels": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "layers": 1}
DEFAULTS = {"frames": 8, "height": 32, "width": 32, "text_length": 12, "fps": 4.0, "source": "mask"}
DEFAULTS |= {"jobs": {job: {"steps": 2} for job in ("generate", "caption", "joint")}}


def random_engine():
    tokenizer = WordTokenizer(vocabulary())
    model = UniViGU(UniViGUConfig(**SIZES, vocab=tokenizer.vocab_size))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # heads start as zeros, which would answer nothing
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.2)
    return Engine(model.eval(), PixelCodec((4, 8, 8), (1, 2, 2)), tokenizer, HashTextEncoder(16, 16), DEFAULTS)


@pytest.fixture(scope="session")
def engine():
    return random_engine()


@pytest.fixture(scope="session")
def model(engine, tmp_path_factory):
    """The folder of a model, as --model takes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    engine.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def broken_model(tmp_path_factory):
    """A sound folder with a model that can answer nothing: its numbers are NaN."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    engine = random_engine()
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(float("nan"))
    engine.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Ran:
    """code: of exit; out, err: what was written; progress: lines of stderr that a slow machine adds."""

    code: int
    out: str
    err: str
    progress: tuple[str, ...]


@pytest.fixture
def uvg(capsys, monkeypatch, tmp_path):
    """Run the command in an empty folder of its own: uvg("caption", "a.mp4") -> Ran."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        lines = err.splitlines(keepends=True)
        progress = tuple(line.strip() for line in lines if PROGRESS.match(line))
        return Ran(code, out, "".join(line for line in lines if not PROGRESS.match(line)), progress)

    return run
