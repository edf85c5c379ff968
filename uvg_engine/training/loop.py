"""The training loop: stages one after the other, one packed batch a micro-step, resumable bitwise at any checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from uvg_engine.files import replacing
from uvg_engine.model.patches import patch_grid
from uvg_engine.model.text_init import text_from_video
from uvg_engine.model.univigu import UniViGU
from uvg_engine.surroundings import cpu_by_default, fp32_by_default
from uvg_engine.training import distributed
from uvg_engine.training.batch import make_batch
from uvg_engine.training.config import Stage, TrainConfig, differences
from uvg_engine.training.ema import Ema
from uvg_engine.training.initial import initial_weights
from uvg_engine.training.losses import compute_losses
from uvg_engine.training.optimizer import make_optimizer
from uvg_engine.training.pieces import data_order, make_dataset, make_pieces, model_config, saved_pieces
from uvg_engine.training.state import checkpoints, load_newest, save_checkpoint

Log = dict[str, float]


class Trainer:
    """One run in a folder: `config.yaml`, `checkpoints/`, `log.jsonl`, TensorBoard files and the exported `model/`.

    Raises ValueError on a config that does not fit and on a folder that cannot be written, before any work starts. A
    run is a function of its config alone: the batch at step s is drawn from (seed, s), so a resumed run continues with
    the same numbers. resume: go on from the newest checkpoint, if there is one.
    """

    @cpu_by_default()
    def __init__(self, config: TrainConfig, folder: str | Path, *, resume: bool = False) -> None:
        self.config, self.folder = config, Path(folder)
        self.rank, self.ranks = distributed.start()
        parts = config.accumulate * self.ranks
        if config.batch_size % parts:
            raise ValueError(f"batch_size must be a multiple of accumulate * ranks = {parts}, got {config.batch_size}")
        found = checkpoints(self.folder / "checkpoints")
        if found and not resume:
            raise ValueError(f"output folder must hold no run unless resumed, got {self.folder} with {found[-1].name}")
        saved = load_newest(self.folder / "checkpoints")
        if saved is not None and (changed := differences(saved["config"], config.to_dict())):
            raise ValueError(f"a resumed run must keep its config, got changes in {', '.join(changed)}")
        torch.manual_seed(config.seed)
        self.dataset = make_dataset(config)
        self.pieces = make_pieces(config, self.dataset) if saved is None else saved_pieces(config, saved)
        self.model = self._make_model(config.init if saved is None else None)
        self.ema = Ema(self.model, config.ema)
        self.step = 0
        self.window: list[Log] = []  # steps since the last log line
        self.optimizer = self._make_optimizer(config.stages[0])
        distributed.barrier()  # every rank has looked for earlier checkpoints
        if saved is not None:
            self._restore(saved)
        if self.rank == 0:
            self._prepare_folder()

    def _make_model(self, init: str | None) -> UniViGU:
        sizes = model_config(self.config, self.pieces)
        patch_grid(self.pieces.codec.latent_shape(self.dataset.clip_shape)[1:], sizes)  # its error, now
        with fp32_by_default():
            model = UniViGU(sizes, compute_dtype=getattr(torch, self.config.dtype))
        return initial_weights(model, init)

    def _make_optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        config = self.config
        return make_optimizer(self.model, config.optimizer, stage.lr, config.betas, config.weight_decay)

    def _prepare_folder(self) -> None:
        """Write the config, and drop what the log says of steps that are to come (again)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(self.config.to_dict(), sort_keys=False))
            _truncate_log(self.folder / "log.jsonl", self.step)
        except OSError as error:
            raise ValueError(f"output folder must be writable, got {self.folder}: {error}") from error

    def run(self, progress: Callable[[int, Log], None] | None = None, stop_at: int | None = None) -> None:
        """Train to the end or to step `stop_at`, with checkpoints on the way. progress(step, log) after every step."""
        last = min(self.config.total_steps, stop_at if stop_at is not None else self.config.total_steps)
        with _Recorder(self.folder, self.step, self.rank == 0) as record:
            while self.step < last:
                log = self.train_step()
                self.window.append(log)
                if progress is not None:
                    progress(self.step, log)
                if self.step % self.config.log_every == 0 or self.step == self.config.total_steps:
                    record(self.step, self.stage.name, _mean(self.window))
                    self.window = []
                if self.rank == 0 and (self.step % self.config.checkpoint_every == 0 or self.step == last):
                    self.save()
        distributed.barrier()

    @property
    def stage(self) -> Stage:
        """The stage that the last step belonged to."""
        return self.config.stages[self.config.stage_at(max(self.step - 1, 0))[0]]

    @cpu_by_default()
    def train_step(self) -> Log:
        """One optimiser step: `accumulate` micro-batches, clipped, averaged into the EMA.

        Returns losses, lr, norm and rate. Raises ValueError on a gradient that is not finite, weights as they were.
        """
        start = time.perf_counter()
        index, within = self.config.stage_at(self.step)
        stage = self.config.stages[index]
        if within == 0 and index:
            self._enter(index)
        lr = _learning_rate(stage, within)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        micro = self.config.batch_size // (self.config.accumulate * self.ranks)
        for part in range(self.config.accumulate):
            first = self.step * self.config.batch_size + (part * self.ranks + self.rank) * micro
            positions = range(first, first + micro)
            samples = self.dataset.batch([data_order(p, len(self.dataset), self.config.seed) for p in positions])
            batch = make_batch(samples, positions, stage, self.config, self.model.config, self.pieces, 0)
            losses = compute_losses(self.model, batch, stage, self.config.loss)
            (losses.total / self.config.accumulate).backward()
            parts.append({"loss": losses.total.item(), "video": losses.video.item(), "text": losses.text.item()})
        distributed.average_gradients(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        means = _mean(parts)
        means = dict(zip(means, distributed.mean_over_ranks(list(means.values())), strict=True))
        if not norm.isfinite():  # the same on every rank
            raise ValueError(
                f"loss and gradient must stay finite, got loss {parts[0]['loss']:.4g} and norm {norm.item()} in step "
                f"{self.step + 1}, stage {stage.name}, lr {lr:.3g}; the last checkpoint is as it was"
            )
        self.optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        seconds = time.perf_counter() - start
        return {**means, "lr": lr, "grad_norm": norm.item(), "samples_per_s": self.config.batch_size / seconds}

    def _enter(self, index: int) -> None:
        """Start stage `index`: the text parts are born from the video parts when the first text stage begins."""
        before, stage = self.config.stages[index - 1], self.config.stages[index]
        if before.text == "none" and stage.text != "none":
            for model in (self.model, self.ema.model):
                torch.manual_seed(self.config.seed + index)
                text_from_video(model)
        self.optimizer = self._make_optimizer(stage)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint of this moment holds; tensors are shared with the trainer."""
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "codec": self.pieces.codec.to_config(),
            "tokenizer": self.pieces.tokenizer.to_config(),
            "rng": torch.get_rng_state(),
            "window": self.window,
            "data_size": len(self.dataset),
        }

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        return save_checkpoint(self.folder / "checkpoints", self.step, self.state(), self.config.keep_checkpoints)

    def _restore(self, saved: dict[str, Any]) -> None:
        size = saved.get("data_size", len(self.dataset))
        if size != len(self.dataset):
            raise ValueError(f"a resumed run must keep its data of {size} samples, got {len(self.dataset)}")
        self.step, self.window = saved["step"], saved.get("window", [])
        self.model.load_state_dict(saved["model"])
        self.ema.model.load_state_dict(saved["ema"])
        self.ema.updates = saved["ema_updates"]
        self.optimizer = self._make_optimizer(self.stage)
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])


class _Recorder:
    """Writes the log lines of a run to `log.jsonl` and TensorBoard; a rank that does not record writes nothing."""

    def __init__(self, folder: Path, step: int, active: bool) -> None:
        self.folder, self.step, self.active = folder, step, active

    def __enter__(self) -> _Recorder:
        if self.active:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
            self.file = open(self.folder / "log.jsonl", "a")
        return self

    def __call__(self, step: int, stage: str, means: Log) -> None:
        if self.active:
            numbers = {name: value for name, value in means.items() if not math.isnan(value)}
            self.file.write(json.dumps({"step": step, "stage": stage, **numbers}) + "\n")
            self.file.flush()
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)

    def __exit__(self, *error: object) -> None:
        if self.active:
            self.file.close()
            self.writer.close()


def _learning_rate(stage: Stage, within: int) -> float:
    """Linear warm-up, then constant or cosine down to final_lr_ratio."""
    if within < stage.warmup:
        return stage.lr * (within + 1) / stage.warmup
    if stage.schedule == "constant":
        return stage.lr
    share = (within - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.lr * (stage.final_lr_ratio + (1 - stage.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share)))


def _mean(logs: list[Log]) -> Log:
    """Mean per name over the logs that have a number there."""
    means = {}
    for name in logs[0]:
        values = [log[name] for log in logs if not math.isnan(log[name])]
        if values:
            means[name] = sum(values) / len(values)
        else:
            means[name] = float("nan")
    return means


def _truncate_log(path: Path, step: int) -> None:
    """Drop log lines after the step that a run starts from."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept))
