"""How large the models are, and how much memory it takes to make and to load them."""

import ctypes

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from uvg_engine.model import (
    UniViGU,
    UniViGUConfig,
    from_pretrained,
    load_published,
    named_config,
    save_pretrained,
    save_published,
)


def anonymous_bytes():
    """Memory of this process that no file backs."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


class Peak(TorchDispatchMode):
    """Follows the memory from torch call to torch call."""

    def __init__(self):
        super().__init__()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or its use again would not show
        self.start = self.most = anonymous_bytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, anonymous_bytes())
        return out

    @property
    def grown(self):
        return self.most - self.start


WIDE = UniViGUConfig(
    heads=4, head_dim=128, in_channels=16, text_dim=512, freq_dim=256, ffn_dim=2048, layers=2, vocab=8000
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("wide"), UniViGU(WIDE)
    save_pretrained(model, folder / "one")
    save_pretrained(model, folder / "many", shard_bytes=2 * 10**7)
    save_published(model, folder / "a.pth")
    return folder, sum(value.nbytes for value in model.state_dict().values())


def test_loading_does_not_hold_the_weights_twice(wide):
    folder, size = wide
    assert size > 10**8
    with Peak() as peak:
        state = {key: value.clone() for key, value in torch.load(folder / "a.pth")["model"].items()}
    assert peak.grown > 0.9 * size, "the measure sees what is held"
    del state
    for source in ("one", "many"):
        with Peak() as peak:
            model = from_pretrained(folder / source)
        assert peak.grown < 1.3 * size, source
        del model
    model = UniViGU(WIDE)
    for source in ("a.pth", "one", "many"):
        with Peak() as peak:
            load_published(model, folder / source)
        assert peak.grown < 0.3 * size, source


def video_and_text_parameters(c):
    """(what Wan2.1 has, what the text adds), counted from the equations."""
    width, patch = c.heads * c.head_dim, c.in_channels * c.patch[0] * c.patch[1] * c.patch[2]

    def linear(inner, outer):
        return inner * outer + outer

    expert = linear(width, c.ffn_dim) + linear(c.ffn_dim, width)
    attention = 4 * linear(width, width) + 2 * width
    block = 2 * attention + 2 * width + expert + 6 * width
    time = linear(c.freq_dim, width) + linear(width, width) + linear(width, 6 * width)
    condition = linear(c.text_dim, width) + linear(width, width)
    video = linear(patch, width) + c.layers * block + time + condition + 2 * width + linear(width, patch)
    text = c.vocab * width + c.layers * expert + time + 2 * width + width + linear(width, c.vocab)
    return video, text


@pytest.mark.parametrize("name, billions", [("1.3b", 1.42), ("14b", 14.29)])
def test_sizes_are_those_of_the_arithmetic_and_nothing_is_allocated(name, billions):
    config = named_config(name)
    with Peak() as peak, torch.device("meta"):
        model = UniViGU(config, torch.bfloat16)
    video, text = video_and_text_parameters(config)
    assert video / 1e9 == pytest.approx(billions, abs=0.005), "Wan2.1's own size"
    assert sum(p.numel() for p in model.parameters()) == video + text
    assert sum(v.numel() for v in model.state_dict().values()) == video + text + config.head_dim // 2
    assert all(p.is_meta for p in model.parameters())
    assert peak.grown < 2e8, "of many gigabytes"
