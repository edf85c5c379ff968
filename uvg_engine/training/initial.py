"""What a run starts from: nothing, a Wan video model, a published checkpoint, or a folder of ours."""

from __future__ import annotations

from uvg_engine.model.checkpoint import load_pretrained, load_published
from uvg_engine.model.univigu import UniViGU
from uvg_engine.model.wan import load_wan

LOADERS = {"wan": load_wan, "published": load_published, "pretrained": load_pretrained}


def initial_weights(model: UniViGU, init: str | None) -> UniViGU:
    """Load `init`, 'KIND:PATH' with KIND wan, published or pretrained, into model; None leaves the fresh weights.

    Raises ValueError on another form, CheckpointError on weights (or a pretrained folder's config) that do not fit.
    """
    if init is None:
        return model
    kind, _, path = init.partition(":")
    if kind not in LOADERS or not path:
        raise ValueError(f"init must be KIND:PATH with KIND one of {', '.join(LOADERS)}, got {init!r}")
    return LOADERS[kind](model, path)
