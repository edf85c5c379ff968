"""A small engine of random weights, none of them zero, and requests for it."""

import functools

import torch

from uvg_engine.media import HashTextEncoder, PixelCodec, WordTokenizer
from uvg_engine.model import UniViGU, UniViGUConfig
from uvg_engine.sampling import Engine, Request

WORDS = "a and blue down fast green left moving of one red right seven slow the three two up".split()
SHAPE = (4, 16, 16)  # frames, height, width
TEXT_LENGTH = 7
DEFAULTS = {"frames": 4, "height": 16, "width": 16, "text_length": TEXT_LENGTH, "jobs": {}}


def make_model(seed=0, vocab=26, **changes):
    """Norm weights about one, all else of the scale of its fan-in; a head sharp enough that words differ."""
    sizes = {"heads": 2, "head_dim": 16, "in_channels": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "layers": 2}
    model, gen = UniViGU(UniViGUConfig(**{**sizes, "vocab": vocab, **changes})), torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if key.endswith("inv_freq"):
            continue
        noise = torch.randn(value.shape, generator=gen)
        if "norm" in key and key.endswith("weight"):
            value.copy_(1 + 0.2 * noise)
        elif key.endswith("weight"):
            value.copy_(noise * (1.0 if "embed.w" in key else value[0].numel() ** -0.5))
        else:
            value.copy_(0.3 * noise)
    return model.eval()


def make_engine(model=None, *, codec=None, tokenizer=None, text_encoder=None, defaults=None, **options):
    """The model's vocabulary is larger than the tokenizer's, as published checkpoints have it."""
    return Engine(
        model or make_model(),
        codec or PixelCodec((2, 4, 4), (1, 2, 2)),
        tokenizer or WordTokenizer(WORDS),
        text_encoder or HashTextEncoder(16, 9),
        {**DEFAULTS, **(defaults or {})},
        **options,
    )


def make_video(seed=0, shape=SHAPE):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(256, (*shape, 3), generator=gen, dtype=torch.uint8)


def alone(engine, request):
    """The result of a request that shares nothing with another one."""
    (result,) = engine.run([request])
    return result


def bits(result):
    """All that a result holds, comparable with ==, floats by their bits."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
        if isinstance(value, tuple):
            return tuple(plain(each) for each in value)
        return plain(tuple(vars(value).values())) if hasattr(value, "__dict__") else value

    return type(result).__name__, plain(result)


@functools.cache
def mixed_requests():
    """Every job, size, step count, solver, rule, guidance and temperature: no two alike."""
    video = make_video()
    return (
        Request("generate", "a red seven", seed=3, num_steps=4),
        Request("generate", "one", seed=3, num_steps=5, solver="unipc", guidance=2.5, trajectory=2),
        Request("generate", "the two blue", seed=-(2**63), num_steps=2, guidance=1, frames=2, height=8, width=24),
        Request("generate", "a red seven", seed=4, num_steps=4, shift=1.0),
        Request("caption", video=video, seed=3, num_steps=6, trajectory=True),
        Request("caption", video=video, seed=9, num_steps=3, text_rule="exact", temperature=0),
        Request("caption", video=make_video(2, (2, 24, 8)), seed=5, num_steps=4, frames=2, height=24, width=8),
        Request("caption", video=video, seed=2**63 - 1, num_steps=3, text_rule="progress", temperature=0.5),
        Request("joint", "green up", seed=3, num_steps=4),
        Request("joint", "the three", seed=7, num_steps=3, text_rule="progress", solver="unipc", trajectory=True),
        Request("joint", "", seed=8, num_steps=1, text_rule="exact", temperature=2.0, frames=8),
    )
