"""The training loop: stages one after the other, one packed batch a micro-step, resumable bitwise at any checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from uvg_engine.files import replacing
from uvg_engine.model.text_init import text_from_video
from uvg_engine.model.univigu import UniViGU
from uvg_engine.surroundings import cpu_by_default, fp32_by_default
from uvg_engine.training import distributed
from uvg_engine.training.batch import Batch, make_batch
from uvg_engine.training.config import Stage, TrainConfig, differences
from uvg_engine.training.ema import Ema
from uvg_engine.training.initial import initial_weights
from uvg_engine.training.losses import compute_losses, noisy_counts
from uvg_engine.training.optimizer import make_optimizer
from uvg_engine.training.pieces import data_order, make_dataset, make_pieces, model_config, saved_pieces
from uvg_engine.training.state import checkpoints, claimed, load_newest, save_checkpoint, step_of

_FREE = ("accumulate",)  # a resumed run may change it, for it changes the rounding alone
_log = logging.getLogger(__name__)
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
        changed = differences(saved["config"], config.to_dict()) if saved is not None else []
        if changed := [name for name in changed if name not in _FREE]:
            raise ValueError(f"a resumed run must keep its config, got changes in {', '.join(changed)}")
        torch.manual_seed(config.seed)
        self.dataset = make_dataset(config)
        self.pieces = make_pieces(config, self.dataset) if saved is None else saved_pieces(config, saved)
        self.model = self._make_model(config.init if saved is None else None)
        self.ema = Ema(self.model, config.ema)
        self.step = 0
        self.window: list[Log] = []  # steps since the last log line
        self.optimizer = self._make_optimizer(config.stages[0])
        if saved is not None:
            self._restore(saved)
        distributed.require_same(
            {
                "training file (by checksum)": zlib.crc32(repr(config).encode()),
                "number of samples": len(self.dataset),
                "step to go on from": self.step,
            }
        )
        if self.rank == 0:
            self._prepare_folder()

    def _make_model(self, init: str | None) -> UniViGU:
        sizes = model_config(self.config, self.pieces)
        with fp32_by_default():
            model = UniViGU(sizes, compute_dtype=getattr(torch, self.config.dtype))
        return initial_weights(model, init)

    def _make_optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        config = self.config
        return make_optimizer(self.model, config.optimizer, stage.lr, config.betas, config.weight_decay)

    def _prepare_folder(self) -> None:
        """Write the config, and drop what the log says of steps that are to come (again)."""
        try:
            with claimed(self.folder):
                with replacing(self.folder / "config.yaml") as temporary:
                    temporary.write_text(yaml.safe_dump(self.config.to_dict(), sort_keys=False))
                _truncate_log(self.folder / "log.jsonl", self.step)
        except OSError as error:
            raise ValueError(f"output folder must be writable, got {self.folder}: {error}") from error

    def run(self, progress: Callable[[int, Log], None] | None = None, stop_at: int | None = None) -> None:
        """Train to the end or to step `stop_at`, with checkpoints on the way. progress(step, log) after every step.

        Raises ValueError where the run is past `stop_at`, and where another process trains in the folder.
        """
        if stop_at is not None and stop_at < self.step:
            raise ValueError(f"stop_at must be at least {self.step}, the step that the run has reached, got {stop_at}")
        last = min(self.config.total_steps, stop_at if stop_at is not None else self.config.total_steps)
        with self._held_folder(), _Recorder(self.folder, self.step, self.rank == 0) as record:
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

    @contextlib.contextmanager
    def _held_folder(self) -> Iterator[None]:
        """Within it the folder is this run's alone. Raises ValueError where another one has gone on in the meantime."""
        with claimed(self.folder) if self.rank == 0 else contextlib.nullcontext():
            found = checkpoints(self.folder / "checkpoints") if self.rank == 0 else []
            if found and step_of(found[-1]) > self.step:
                raise ValueError(f"output folder must hold no step after {self.step}, got {found[-1]}: resume again")
            yield

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
        batches = [self._batch(part, stage) for part in range(self.config.accumulate)]
        counts = distributed.sum_over_ranks([sum(own) for own in zip(*map(noisy_counts, batches))])
        shares = []
        for batch in batches:
            losses = compute_losses(self.model, batch, stage, self.config.loss, counts)
            losses.total.backward()
            shares.append([losses.total.item(), losses.video.item(), losses.text.item()])
        distributed.sum_gradients(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        loss, video, text = distributed.sum_over_ranks([sum(numbers) for numbers in zip(*shares)])
        if not norm.isfinite():  # the same on every rank
            raise ValueError(
                f"loss and gradient must stay finite, got loss {loss:.4g} and norm {norm.item()} in step "
                f"{self.step + 1}, stage {stage.name}, lr {lr:.3g}; the last checkpoint is as it was. Resumed, the run "
                "ends here again: export it and start one with init: pretrained:DIR and a lower lr"
            )
        self.optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        seconds = time.perf_counter() - start
        rate = self.config.batch_size / seconds
        means = {"loss": loss, "video": video, "text": text}
        return {**means, "lr": lr, "grad_norm": norm.item(), "samples_per_s": rate}

    def _batch(self, part: int, stage: Stage) -> Batch:
        """This rank's samples of a part of the coming step."""
        config, ranks = self.config, self.ranks
        micro = config.batch_size // (config.accumulate * ranks)
        first = self.step * config.batch_size + (part * ranks + self.rank) * micro
        positions = range(first, first + micro)
        samples = self.dataset.batch([data_order(p, len(self.dataset), config.seed) for p in positions])
        return make_batch(samples, positions, stage, config, self.model.config, self.pieces, 0)

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
            "ranks": self.ranks,
        }

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        return save_checkpoint(self.folder / "checkpoints", self.step, self.state(), self.config.keep_checkpoints)

    def _restore(self, saved: dict[str, Any]) -> None:
        size = saved.get("data_size", len(self.dataset))
        if size != len(self.dataset):
            raise ValueError(f"a resumed run must keep its data of {size} samples, got {len(self.dataset)}")
        before = saved["config"]["accumulate"], saved.get("ranks", self.ranks)
        if self.rank == 0 and before != (self.config.accumulate, self.ranks):
            _log.warning(
                "accumulate and ranks were %d and %d, now %d and %d: numbers go on up to rounding, not bitwise",
                *before,
                self.config.accumulate,
                self.ranks,
            )
        self.step, self.window = saved["step"], saved.get("window", [])
        self.model.load_state_dict(saved["model"])
        self.ema.model.load_state_dict(saved["ema"])
        self.ema.updates = saved["ema_updates"]
        self.optimizer = self._make_optimizer(self.stage)
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])


class _Recorder:
    """Writes the log lines of a run to `log.jsonl` and TensorBoard; a rank that does not record writes nothing.

    Raises OSError that names the file where the disk does not take them.
    """

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
            with _writing(self.folder / "log.jsonl"):
                self.file.write(json.dumps({"step": step, "stage": stage, **numbers}) + "\n")
                self.file.flush()
            with _writing(self.folder / "tensorboard"):
                for name, value in numbers.items():
                    self.writer.add_scalar(name, value, step)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self.active:
            # every line was flushed: what fails here is what failed before, or TensorBoard's last numbers
            with contextlib.suppress(OSError):
                self.file.close()
            with contextlib.suppress(OSError) if kind else _writing(self.folder / "tensorboard"):
                self.writer.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of an open file, so without its name
        raise OSError(f"{path} must be writable, got {error}") from error


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
    kept = [line for line in path.read_text(errors="replace").splitlines() if _step_in(line) <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept))


def _step_in(line: str) -> float:
    """The step of a log line; one that a kill cut short has none, and comes after all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
