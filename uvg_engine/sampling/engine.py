"""The one object that a user holds: model, codec, tokenizer, text encoder and defaults."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvg_engine.files import replacing
from uvg_engine.media import codec_from_config, text_encoder_from_config, tokenizer_from_config
from uvg_engine.model import UniViGU
from uvg_engine.model.checkpoint import from_pretrained, save_pretrained
from uvg_engine.model.patches import patch_grid
from uvg_engine.ops import require
from uvg_engine.sampling.defaults import EngineDefaults
from uvg_engine.sampling.replay import Replays
from uvg_engine.sampling.requests import CaptionResult, GenerateResult, JointResult, Request, Result, Video, seed_list
from uvg_engine.sampling.savings import Savings
from uvg_engine.sampling.scheduler import Callback, Handle, Scheduler, check_max_rows
from uvg_engine.surroundings import cpu_by_default

ENGINE_FILE, TOKENIZER_FILE = "engine.json", "tokenizer.json"
FORMAT = 1
PRECISIONS = ("full", "int8")
EMBEDDED = Path(__file__).parents[1] / "embedded"


class Engine:
    """Generates, captions and does both at once.

    codec, tokenizer, text_encoder: from uvg_engine.media, or objects with the same methods. defaults: an EngineDefaults
    or a mapping of its fields. savings, max_rows: see Savings and Scheduler; they change no result. The model is used
    as it is: its device, its dtype, its weights at the time of the call. Raises ValueError where the parts do not fit.

    The same request with the same seed gives the same bits, whatever it shares a batch with.
    """

    def __init__(
        self,
        model: UniViGU,
        codec: Any,
        tokenizer: Any,
        text_encoder: Any,
        defaults: EngineDefaults | Mapping[str, Any],
        *,
        savings: Savings | None = None,
        max_rows: int = 32768,
    ) -> None:
        self.model, self.codec, self.tokenizer, self.text_encoder = model, codec, tokenizer, text_encoder
        self.defaults = defaults if isinstance(defaults, EngineDefaults) else EngineDefaults.from_dict(defaults)
        self.savings = savings or Savings()
        check_max_rows(max_rows)
        self.max_rows = max_rows
        self.replays = Replays()
        config = model.config
        shape = codec.latent_shape((self.defaults.frames, self.defaults.height, self.defaults.width))
        if shape[0] != config.in_channels:
            raise ValueError(f"codec must have {config.in_channels} channels like the model, got {shape[0]}")
        patch_grid(shape[1:], config)
        if text_encoder.text_dim != config.text_dim:
            raise ValueError(
                f"text encoder must have text_dim {config.text_dim} like the model, got {text_encoder.text_dim}"
            )
        if tokenizer.vocab_size > config.vocab:
            raise ValueError(
                f"tokenizer must have at most {config.vocab} ids like the model, got {tokenizer.vocab_size}"
            )
        if self.defaults.source == "mask" and tokenizer.mask_id is None:
            raise ValueError('source must be "uniform" where the tokenizer has no mask token, got "mask"')

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        precision: str = "full",
        savings: Savings | None = None,
        max_rows: int = 32768,
    ) -> Engine:
        """An engine from a folder that `save_pretrained` wrote, or a model that ships with the package ("digits").

        A name without a separator is first looked for in the package. dtype: of the weights (None: as stored).
        compute_dtype: of the matrix products (None: that of the weights). precision: "full", or "int8" for the blocks'
        products in bytes, faster on a CPU with AVX-512 VNNI and less exact (docs/sampling.md). Paths in engine.json may
        be relative to the folder. Raises ValueError on a folder that lacks a file or holds one that does not fit.
        """
        require(precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}", precision)
        on_cpu = torch.device(device).type == "cpu"
        require(on_cpu or precision == "full", 'precision must be "full" on a device other than the CPU', precision)
        folder = _find(source)
        config = _read_json(folder / ENGINE_FILE)
        if config.get("format") != FORMAT:
            raise ValueError(f"{ENGINE_FILE} must have format {FORMAT}, got {config.get('format')!r}")
        wanted = {"format", "codec", "tokenizer", "text_encoder", "defaults"}
        if set(config) != wanted:
            raise ValueError(f"{ENGINE_FILE} must name {', '.join(sorted(wanted))}, got {', '.join(sorted(config))}")
        tokenizer = _read_json(folder / str(config["tokenizer"]))
        model = from_pretrained(folder, dtype=dtype, compute_dtype=compute_dtype, device=device).eval()
        model.int8 = precision == "int8"
        with cpu_by_default():
            parts = (
                codec_from_config(_located(config["codec"], folder)),
                tokenizer_from_config(_located(tokenizer, folder)),
                text_encoder_from_config(_located(config["text_encoder"], folder)),
            )
        defaults = EngineDefaults.from_dict(config["defaults"])
        return cls(model, *parts, defaults, savings=savings, max_rows=max_rows)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors, tokenizer.json and engine.json, each whole or not at all."""
        folder = Path(folder)
        config = {
            "format": FORMAT,
            "codec": self.codec.to_config(),
            "tokenizer": TOKENIZER_FILE,
            "text_encoder": self.text_encoder.to_config(),
            "defaults": self.defaults.to_dict(),
        }
        files = {TOKENIZER_FILE: self.tokenizer.to_config(), ENGINE_FILE: config}
        texts = {name: json.dumps(value, ensure_ascii=False, indent=1) + "\n" for name, value in files.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_pretrained(self.model, folder)
        for name, text in texts.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    @property
    def mask_id(self) -> int:
        """The token that text starts from, or -1 for the uniform source."""
        return self.tokenizer.mask_id if self.defaults.source == "mask" else -1

    def decode(self, tokens: Sequence[int] | Tensor, *, stop_at_eos: bool = True) -> str:
        """Text of ids; an id of the model's head that the tokenizer does not know reads as an unknown word."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        size, unk = self.tokenizer.vocab_size, self.tokenizer.unk_id
        known = [i if i < size else unk for i in ids]
        return self.tokenizer.decode([i for i in known if i is not None], stop_at_eos=stop_at_eos)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        num_steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        solver: str | None = None,
        seeds: int | Sequence[int] | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        trajectory: bool | int = False,
        callback: Callback | None = None,
    ) -> list[GenerateResult]:
        """Videos from prompts: always a list, one result per prompt in their order, also for a single string.

        prompts: an array of strings will do. What is None is the engine's default. guidance: 1 is none. solver: "euler"
        or "unipc". seeds: None draws them (each result tells its own), a number gives seed, seed + 1, ..., a list one
        each. frames, height, width: pixels. trajectory and callback: see Request and Scheduler. Warns of unknown words;
        raises ValueError on what cannot be.
        """
        own = {"num_steps": num_steps, "guidance": guidance, "shift": shift, "solver": solver, "trajectory": trajectory}
        own |= {"frames": frames, "height": height, "width": width}
        return self._run_all("generate", "prompt", _prompts(prompts), seeds, callback, own)

    def caption(
        self,
        videos: Video | Sequence[Video],
        *,
        num_steps: int | None = None,
        shift: float | None = None,
        text_rule: str | None = None,
        temperature: float | None = None,
        seeds: int | Sequence[int] | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        trajectory: bool | int = False,
        callback: Callback | None = None,
    ) -> list[CaptionResult]:
        """Texts from videos: uint8 [F, H, W, 3] or [B, F, H, W, 3], a file's path, or a list of them; always a list.

        A video of another size than frames, height, width (None: the engine's) is fitted, with a warning. shift: of the
        text's times. text_rule: "euler", "exact" or "progress". temperature: of the draws, 0 is argmax. The rest as in
        `generate`.
        """
        own = {"num_steps": num_steps, "shift": shift, "text_rule": text_rule, "temperature": temperature}
        own |= {"frames": frames, "height": height, "width": width, "trajectory": trajectory}
        return self._run_all("caption", "video", _videos(videos), seeds, callback, own)

    def joint(
        self,
        prompts: str | Sequence[str],
        *,
        num_steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        solver: str | None = None,
        text_rule: str | None = None,
        temperature: float | None = None,
        seeds: int | Sequence[int] | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        trajectory: bool | int = False,
        callback: Callback | None = None,
    ) -> list[JointResult]:
        """A video and its caption together, for each prompt. Arguments as in `generate` and `caption`."""
        own = {"num_steps": num_steps, "guidance": guidance, "shift": shift, "solver": solver, "trajectory": trajectory}
        own |= {"text_rule": text_rule, "temperature": temperature}
        own |= {"frames": frames, "height": height, "width": width}
        return self._run_all("joint", "prompt", _prompts(prompts), seeds, callback, own)

    def run(self, requests: Iterable[Request], *, callback: Callback | None = None) -> list[Result]:
        """Any mix of jobs, sizes and step counts, packed together; results in the order of the requests.

        All requests are checked first. Raises what went wrong with the first request that could not be finished.
        """
        scheduler = self.scheduler(callback=callback)
        handles = [scheduler.submit(request) for request in requests]
        for handle in scheduler.drain():
            _ = handle.result
        return [handle.result for handle in handles]

    def stream(self, requests: Iterable[Request], *, callback: Callback | None = None) -> Iterator[tuple[int, Result]]:
        """(place of the request, result) as they are done; requests are taken as room comes free, so may be endless.

        Each is checked when it is taken. Raises as `run` does; a service that goes on after a failure has `scheduler`.
        """
        scheduler = self.scheduler(callback=callback)
        source = enumerate(requests)
        places: dict[Handle, int] = {}
        more = True
        while more or not scheduler.idle:
            while more and scheduler.has_room:
                taken = next(source, None)
                more = taken is not None
                if taken is not None:
                    places[scheduler.submit(taken[1])] = taken[0]
            for handle in scheduler.step():
                yield places.pop(handle), handle.result

    def scheduler(
        self, *, max_rows: int | None = None, savings: Savings | None = None, callback: Callback | None = None
    ) -> Scheduler:
        """For a service: submit requests at any time, call step() in a loop. None: the engine's own settings."""
        return Scheduler(self, max_rows=max_rows, savings=savings, callback=callback)

    def _run_all(self, kind: str, key: str, inputs: list, seeds: Any, callback: Callback | None, own: dict) -> list:
        chosen = seed_list(seeds, len(inputs))
        requests = [Request(kind, seed=seed, **{key: value}, **own) for value, seed in zip(inputs, chosen, strict=True)]
        return self.run(requests, callback=callback)


def _prompts(prompts: str | Sequence[str]) -> list[str]:
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a string or a list of strings, got {type(prompts).__name__}")
    return list(prompts)


def _videos(videos: Video | Sequence[Video]) -> list[Video]:
    if isinstance(videos, (str, os.PathLike)):
        return [videos]
    if isinstance(videos, Tensor):
        return list(videos) if videos.dim() == 5 else [videos]
    if not isinstance(videos, Sequence):
        raise ValueError(f"videos must be a uint8 tensor, a path or a list of them, got {type(videos).__name__}")
    return list(videos)


def _find(source: str | os.PathLike[str]) -> Path:
    embedded = sorted(path.name for path in EMBEDDED.glob("*") if (path / ENGINE_FILE).is_file())
    if str(source) in embedded:
        return EMBEDDED / str(source)
    folder = Path(source)
    if not (folder / ENGINE_FILE).is_file():
        names = ", ".join(embedded) or "none"
        raise ValueError(
            f"source must be a folder with {ENGINE_FILE} or one of the package's models ({names}), got {str(source)!r}"
        )
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a readable json file, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a json object, got {type(value).__name__}")
    return value


def _located(config: Any, folder: Path) -> dict[str, Any]:
    """Paths of a codec's or encoder's config that lie in the model's folder, made whole."""
    if not isinstance(config, dict):
        raise ValueError(f"{ENGINE_FILE} must hold a json object for each part, got {config!r}")
    inside = {
        k: str((folder / v).absolute())  # also of the next `save_pretrained`, into another folder
        for k, v in config.items()
        if k.endswith("path") and isinstance(v, str) and (folder / v).exists()
    }
    return {**config, **inside}
