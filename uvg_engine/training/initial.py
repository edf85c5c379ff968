"""What a run starts from: nothing, a Wan video model, a published checkpoint, or a folder of ours."""

from __future__ import annotations

from uvg_engine.model.univigu import UniViGU

KINDS = ("wan", "published", "pretrained")


def initial_weights(model: UniViGU, init: str | None) -> UniViGU:
    """Load `init`, 'KIND:PATH' with KIND wan, published or pretrained, into model; None leaves the fresh weights.

    Raises ValueError on another form, CheckpointError on weights that do not fit.
    """
    if init is None:
        return model
    from uvg_engine.model import checkpoint

    kind, _, path = init.partition(":")
    if kind not in KINDS or not path:
        raise ValueError(f"init must be KIND:PATH with KIND one of {', '.join(KINDS)}, got {init!r}")
    if kind == "wan":
        return checkpoint.load_wan(model, path)
    if kind == "published":
        return checkpoint.load_published(model, path)
    model.load_state_dict(checkpoint.from_pretrained(path).state_dict())
    return model
