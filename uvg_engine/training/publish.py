"""From a training run to the parts of an engine: trained weights and everything that reads and writes for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uvg_engine.model.univigu import UniViGU
from uvg_engine.surroundings import cpu_by_default
from uvg_engine.training.config import TrainConfig
from uvg_engine.training.data.digits import DigitsDataset
from uvg_engine.training.data.folder import DEFAULT_CLIP_SHAPE, checked_clip_shape
from uvg_engine.training.loop import Trainer
from uvg_engine.training.pieces import model_config, saved_pieces
from uvg_engine.training.state import checkpoints, load_checkpoint


def find_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run's folder (also one that is still training), or the checkpoint file itself.

    Raises ValueError where there is none.
    """
    run = Path(run)
    if run.is_file():
        return run
    found = checkpoints(run / "checkpoints")
    if not found:
        raise ValueError(f"run must be a folder of `uvg train` with a checkpoint, or a checkpoint file, got {run}")
    return found[-1]


@cpu_by_default()
def engine_parts(source: Trainer | str | Path, *, ema: bool = True) -> dict[str, Any]:
    """What `uvg_engine.Engine(**parts)` takes: model, codec, tokenizer, text_encoder, defaults (a mapping).

    source: a trainer at hand, a run's folder (its newest checkpoint) or a checkpoint file. ema: the averaged weights,
    else the last ones. The weights are a copy, in fp32, on the CPU; the data set is not opened. Raises ValueError on a
    source that holds no training state of ours.
    """
    saved = source.state() if isinstance(source, Trainer) else load_checkpoint(find_checkpoint(source))
    config = TrainConfig.from_dict(saved["config"])
    pieces = saved_pieces(config, saved)
    model = UniViGU(model_config(config, pieces)).float()  # whatever torch's default dtype is
    model.load_state_dict(saved["ema" if ema else "model"])
    return {
        "model": model.eval().requires_grad_(False),
        "codec": pieces.codec,
        "tokenizer": pieces.tokenizer,
        "text_encoder": pieces.text_encoder,
        "defaults": engine_defaults(config),
    }


def engine_defaults(config: TrainConfig) -> dict[str, Any]:
    """How a model of this training file samples: what it was trained as, under what the file's `defaults` say."""
    if config.data.get("type") == "folder":
        shape, fps = checked_clip_shape(config.data.get("clip_shape", DEFAULT_CLIP_SHAPE)), {}
    else:
        shape, fps = DigitsDataset.clip_shape, {"fps": float(DigitsDataset.fps)}
    frames, height, width = shape
    trained = {"frames": frames, "height": height, "width": width, "text_length": config.text_length, **fps}
    given = dict(config.defaults)
    own = {kind: {"kappa_power": config.times.text_power} for kind in ("generate", "caption", "joint")}
    jobs = given.pop("jobs", {})
    if isinstance(jobs, Mapping):  # EngineDefaults refuses anything else, here and within
        asked = {kind: {**own.get(kind, {}), **job} if isinstance(job, Mapping) else job for kind, job in jobs.items()}
        jobs = {**own, **asked}
    return {**trained, "source": config.source, "jobs": jobs, **given}
