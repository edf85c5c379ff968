"""A request under way. Letters: N latent values of a sample, L its tokens."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uvg_engine.backends.devices import put
from uvg_engine.flow import Step
from uvg_engine.model.layout import tiles
from uvg_engine.model.univigu import ConditionKV
from uvg_engine.ops import flow_source, jump_coins
from uvg_engine.sampling.prepare import Prepared
from uvg_engine.sampling.savings import Savings
from uvg_engine.sampling.time_tables import TimeTables

if TYPE_CHECKING:
    from uvg_engine.sampling.engine import Engine

_HISTORY = (2, 4, 5, 8)  # coefficients of flow_step that read earlier steps
_serials = itertools.count()


class State:
    """A request under way: both streams, where it is, and its condition.

    latents: fp32 [N]. tokens: int64 [L]. text_mask: False where a token is a pad (None: no pads). coins: bool
    [steps, L], on the CPU. step: steps done. estimate: the data estimate of the last step. failed: the model gave no
    distribution for a token; on a GPU that is known a step later, or after `look`.
    """

    def __init__(self, prepared: Prepared, engine: Engine, savings: Savings) -> None:
        self.prepared, self.steps = prepared, prepared.job.steps
        self.seed = prepared.seed
        self.serial = next(_serials)  # unlike id(), never used twice
        self.step, self.failed = 0, False
        self._drawn: deque[tuple[int, Callable[[], Tensor]]] = deque()  # not looked at: steps done, the tokens then
        self.keeps_history = any(step.coefs[k] for step in self.steps for k in _HISTORY)
        self.last: Tensor | None = None
        self.m1: Tensor | None = None
        self.m2: Tensor | None = None
        self.latents, self.tokens, self.text_mask = _start(prepared, engine, savings)
        self.estimate = self.latents
        self.coins = _toss(self)
        prompt = prepared.request.prompt
        null = prepared.job.null_condition or prompt is None
        self.condition: Tensor | None = None if null else rows_of(engine.text_encoder.encode([prompt])[0], engine)
        self.condition_kv: ConditionKV | None = None
        self.tables: TimeTables | None = None

    @property
    def now(self) -> Step:
        """The step to do next."""
        return self.steps[self.step]

    @property
    def done(self) -> bool:
        """Nothing left to do."""
        return self.failed or self.step == len(self.steps)

    def told(self, tokens: Callable[[], Tensor]) -> None:
        """The present step drew these tokens."""
        self._drawn.append((self.step + 1, tokens))

    def look(self, newest: bool = True) -> None:
        """See whether a draw failed, that of the last step too or those before it: there the state has ended. Waits for
        the device to be done with those steps."""
        while self._drawn and (newest or self._drawn[0][0] < self.step):
            step, tokens = self._drawn[0]
            failed = bool((tokens() < 0).any())  # raises where the device failed: then it was not looked at
            self._drawn.popleft()
            if failed:
                self.failed, self.step = True, step
                self._drawn.clear()

    @property
    def coins_now(self) -> Tensor:
        """bool [L]: which tokens jump in this step."""
        return self.coins[self.step]


def _start(prepared: Prepared, engine: Engine, savings: Savings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both streams as the job begins: noise, source, or the clean data that was given; and the mask of the text."""
    device, kind = engine.model.device, prepared.request.kind
    num_latents = 0 if kind == "caption" else math.prod(prepared.latent_shape)
    num_tokens = 0 if kind == "generate" else prepared.text_len
    latents, tokens = flow_source(
        torch.tensor([prepared.seed], dtype=torch.int64),
        torch.tensor([(0, num_latents)], dtype=torch.int32),
        torch.tensor([(0, num_tokens)], dtype=torch.int32),
        num_latents,
        num_tokens,
        engine.model.config.vocab,
        engine.mask_id,
    )
    mask = None
    if kind == "caption":
        latents = engine.codec.encode(prepared.frames).float()
        if latents.shape != prepared.latent_shape:
            raise ValueError(f"codec must encode to {prepared.latent_shape}, got {tuple(latents.shape)}")
        latents = latents.flatten()
    if kind == "generate":
        ids = list(prepared.prompt_tokens)
        if not savings.drop_padding:
            pads = engine.defaults.text_length - len(ids)
            mask = torch.tensor([True] * len(ids) + [False] * pads)
            ids += [engine.tokenizer.pad_id] * pads
        tokens = torch.tensor(ids, dtype=torch.int64)
    return put(latents, device), put(tokens, device), mask


def rows_of(condition: Tensor, engine: Engine) -> Tensor:
    """What a text encoder gave, on the model's device. Checked: a misfit would fail the whole batch, later."""
    width = engine.model.config.text_dim
    if condition.dim() != 2 or condition.shape[1] != width:
        raise ValueError(f"text encoder must return rows of {width}, got {tuple(condition.shape)}")
    return put(condition, engine.model.device)


def _toss(state: State) -> Tensor:
    """The coins of all steps at once: they read nothing but (seed, step, token)."""
    steps, length = state.steps, len(state.tokens)
    flat = jump_coins(
        torch.tensor([s.jump_prob for s in steps], dtype=torch.float32),
        torch.full((len(steps),), state.seed, dtype=torch.int64),
        torch.tensor([s.index for s in steps], dtype=torch.int64),
        torch.tensor(tiles([length] * len(steps)), dtype=torch.int32),
        len(steps) * length,
    )
    return flat.view(len(steps), length)
