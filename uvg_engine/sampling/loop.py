"""One step of every active request in one packed forward.

Letters: N latent values of a sample, L its tokens. A request is one sample, or two where there is guidance: the
conditional branch and, with the same text and another condition, the unconditional one. No sample's bits depend on
the others: matrix products run sample by sample, and every draw is named by (seed, step, token).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uvg_engine.backends.devices import fetch, put
from uvg_engine.model import Layout, UniViGU
from uvg_engine.model.blocks import Asking, BlockCondition, Reading
from uvg_engine.model.layout import TEXT, VIDEO, Selection, tiles
from uvg_engine.model.univigu import ConditionKV, PackedOutput, TimeTable
from uvg_engine.ops import flow_step, linear_sample
from uvg_engine.sampling.savings import Savings
from uvg_engine.sampling.state import State, rows_of
from uvg_engine.sampling.time_tables import TimeTables, joined, times_of

if TYPE_CHECKING:
    from uvg_engine.sampling.engine import Engine

Branch = tuple[int, bool]  # serial of a state, whether this is its conditional branch


@dataclass(frozen=True)
class Packed:
    """What the model has to know of a composition of the batch. layout: of `branches` of it, where there are some.

    key: equal for compositions that differ in the values of their conditions only. condition: k, v and, with `asking`,
    constant of each block, one after the other.
    """

    composition: list[Branch]
    key: Hashable
    layout: Layout
    condition: list[Tensor]
    asking: Asking | None
    asks: list[bool]
    branches: Selection | None

    @property
    def whole(self) -> Layout:
        """Of all samples."""
        return self.layout if self.branches is None else self.branches.layout

    def reading(self, video: list[bool], text: list[bool]) -> Reading | None:
        """Of these modalities of the samples; None where that is all there is."""
        read = Selection.of_read(self.whole, video, text)
        if read.layout.num_rows == self.whole.num_rows:
            return None
        return Reading(read, None if self.asking is None else Asking.build(read.layout, self.asks))


class Loop:
    """Advances states of one engine. Holds what outlives a step: the null condition, the head, the last layout."""

    def __init__(self, engine: Engine, savings: Savings) -> None:
        self.model: UniViGU = engine.model
        self.savings = savings
        self._null = rows_of(engine.text_encoder.null(), engine)
        self._replays = engine.replays
        self._tables: weakref.WeakValueDictionary[tuple, TimeTables] = weakref.WeakValueDictionary()  # by times
        self.forget()

    def forget(self) -> None:
        """Let go of what the steps left: where no request is under way, the weights may be others by the next one."""
        self._null_kv: ConditionKV | None = None
        self._head: list[Tensor] | None = None
        self._packed: Packed | None = None
        self._reading: tuple[Packed, list[bool], list[bool], Reading | None] | None = None

    @property
    def _looks_later(self) -> bool:
        """Whether the device works while the host goes on."""
        return self.model.device.type == "cuda"

    @torch.no_grad()
    def advance(self, states: Sequence[State]) -> None:
        """One step for each. If it raises, every state is as it was, but where the device failed in earlier work.

        The host looks at the tokens of a step while a GPU is at the next one, which it would not be if the host waited.
        """
        skip = self.savings.skip_idle
        moving = [s for s in states if s.now.video_moves or bool(s.coins_now.any()) or not skip]
        if moving:
            self._forward(moving)
        for state in states:
            state.step += 1
        for state in states:
            state.look(newest=not self._looks_later)

    def _forward(self, states: list[State]) -> None:
        everyone = states + [s for s in states if self._is_guided(s)]
        branches = [(s.serial, i < len(states)) for i, s in enumerate(everyone)]
        drawing = [self._drawing(s) for s in states]
        read_video, read_text = self._read(everyone, drawing)
        packed = self._pack(states, everyone, branches)
        first = everyone if packed.branches is None else states
        tables = self._time_tables(first)
        changing = [
            torch.cat([s.latents for s in first]),
            self._words(first),
            self._floats([s.now.video_time for s in first]),
            self._floats([s.now.text_time for s in first]),
            *itertools.chain(*tables or ()),
        ]
        reading = self._reading_of(packed, read_video, read_text)

        def forward(changing: Sequence[Tensor], resting: Sequence[Tensor]) -> PackedOutput:
            latents, tokens, time_v, time_t, *of_times = changing
            return self.model.packed(
                *(latents, tokens, packed.layout, time_v, time_t, _blocks(resting, packed.asking)),
                isolate=True,
                time_tables=((of_times[0], of_times[1]), (of_times[2], of_times[3])) if of_times else None,
                asking=packed.asking,
                branches=packed.branches,
                reading=reading,
            )

        if self.savings.replay:
            key = (packed.key, tuple(read_video), tuple(read_text), len(changing))
            out = self._replays.run(self.model, key, changing, packed.condition, forward)
        else:
            out = forward(changing, packed.condition)
        velocities: dict[Branch, Tensor] = {}
        if out.velocity is not None:
            sizes = [len(s.latents) if reads else 0 for s, reads in zip(everyone, read_video, strict=True)]
            velocities = dict(zip(branches, out.velocity.split(sizes), strict=True))
        self._step(states, velocities, self._draw(states, drawing, read_text, out.text_hidden))

    def _is_guided(self, state: State) -> bool:
        """Whether the unconditional branch is computed."""
        if not self.savings.skip_unguided:
            return state.prepared.request.kind != "caption"
        return state.now.video_moves and state.prepared.job.guidance != 1

    def _read(self, everyone: list[State], drawing: list[Tensor]) -> tuple[list[bool], list[bool]]:
        """Of each sample, whether its velocity and whether its text are read."""
        if not self.savings.skip_unread:
            return [True] * len(everyone), [True] * len(everyone)
        unconditional = [False] * (len(everyone) - len(drawing))
        return [s.now.video_moves for s in everyone], [*(bool(d.any()) for d in drawing), *unconditional]

    def _pack(self, states: list[State], everyone: list[State], composition: list[Branch]) -> Packed:
        """The last one is kept."""
        if self._packed is not None and self._packed.composition == composition and self.savings.condition_cache:
            return self._packed
        parts = [self._condition(s, conditional) for s, (_, conditional) in zip(everyone, composition, strict=True)]
        layout = self._layout(everyone, [len(part[0].k) for part in parts])
        asks = [part[0].constant is None for part in parts]
        asking, condition = None if all(asks) else Asking.build(layout, asks), []
        for block in zip(*parts, strict=True):
            condition += [torch.cat([c.k for c in block]), torch.cat([c.v for c in block])]
            if asking is not None:  # what stands for a sample that asks is not read
                idle = condition[-1].new_zeros(1, condition[-1].shape[1])
                condition.append(torch.cat([idle if c.constant is None else c.constant for c in block]))
        masks = tuple(None if s.text_mask is None else tuple(s.text_mask.tolist()) for s in everyone)
        shape = (layout.grids, layout.text_lens, layout.cond_lens, masks, tuple(asks), len(states))
        branches, goes_on_from = None, None
        if self.savings.share_first_attention and len(everyone) > len(states):
            alone, places = self._layout(states, [0] * len(states)), {s.serial: i for i, s in enumerate(states)}
            goes_on_from = tuple(places[s.serial] for s in everyone)
            branches, layout = Selection.build(alone, layout, goes_on_from), alone
        self._packed = Packed(composition, (*shape, goes_on_from), layout, condition, asking, asks, branches)
        return self._packed

    def _reading_of(self, packed: Packed, video: list[bool], text: list[bool]) -> Reading | None:
        """`Packed.reading`; the last one is kept."""
        last = self._reading
        if last is None or last[0] is not packed or last[1:3] != (video, text):
            self._reading = last = (packed, video, text, packed.reading(video, text))
        return last[3]

    def _layout(self, states: list[State], cond_lens: list[int]) -> Layout:
        return Layout.build(
            [s.prepared.grid for s in states],
            [len(s.tokens) for s in states],
            cond_lens,
            text_masks=[s.text_mask for s in states],
            device=self.model.device,
        )

    def _condition(self, state: State, conditional: bool) -> ConditionKV:
        """Keys and values for one sample, computed alone."""
        cache = self.savings.condition_cache
        if not conditional or state.condition is None:
            if self._null_kv is None or not cache:
                self._null_kv = self._condition_kv(self._null)
            return self._null_kv
        if state.condition_kv is None or not cache:
            state.condition_kv = self._condition_kv(state.condition)
        return state.condition_kv

    def _condition_kv(self, rows: Tensor) -> ConditionKV:
        if self.savings.constant_condition and len(rows) and bool((rows == rows[:1]).all()):
            return self.model.condition_constant(self.model.condition_kv(rows[:1], [1], isolate=True))
        return self.model.condition_kv(rows, [len(rows)], isolate=True)

    def _time_tables(self, states: list[State]) -> tuple[TimeTable, TimeTable] | None:
        """Of the present step of each."""
        if not self.savings.time_tables:
            return None
        for state in states:
            if state.tables is None:
                times = times_of(state.steps)
                state.tables = self._tables.get(times) or TimeTables(self.model, state.steps)
                self._tables[times] = state.tables
        now = [(s.tables, s.now) for s in states if s.tables is not None]
        video = [tables.row(VIDEO, step.video_time) for tables, step in now]
        return joined(video), joined([tables.row(TEXT, step.text_time) for tables, step in now])

    def _drawing(self, state: State) -> Tensor:
        """bool [L]: the tokens whose head is evaluated."""
        if not state.now.text_moves:
            return torch.full((len(state.tokens),), not self.savings.skip_unread)
        return state.coins_now if self.savings.lazy_head else torch.ones_like(state.coins_now)

    def _draw(self, states: list[State], drawing: list[Tensor], reads: list[bool], hidden: Tensor | None) -> Tensor:
        """Tokens drawn where `drawing`, of the conditional branches (they come first); elsewhere 0.

        hidden: of the states whose text is read, one after the other.
        """
        device, wanted = self.model.device, torch.cat(drawing)
        drawn = torch.zeros(len(wanted), dtype=torch.int64, device=device)
        if hidden is None or not bool(wanted.any()):
            return drawn
        if self._head is None:
            head = self.model.text_head.linear
            self._head = [p.detach().to(self.model.dtype) for p in (head.weight, head.bias)]
        place = torch.cat([torch.full_like(d, r) for d, r in zip(drawing, reads)]).cumsum(0) - 1  # in `hidden`
        lens = torch.tensor([len(s.tokens) for s in states])
        heats = [0.0 if s.now.argmax else float(s.prepared.temperature) for s in states]

        def per_token(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype).repeat_interleave(lens)

        seeds, steps = per_token([s.seed for s in states]), per_token([s.now.index for s in states])
        places = torch.cat([torch.arange(len(s.tokens)) for s in states])
        heat = per_token(heats, torch.float64)
        for temperature in sorted(set(heats)):
            index = torch.nonzero(wanted & (heat == temperature)).flatten()
            if len(index):
                names = [put(x[index], device) for x in (seeds, steps, places)]
                ids = linear_sample(hidden[put(place[index], device)], *self._head, *names, temperature=temperature)
                drawn[put(index, device)] = ids
        return drawn

    def _step(self, states: list[State], velocities: dict[Branch, Tensor], drawn: Tensor) -> None:
        """flow_step on all states, and the results back into them."""
        device = self.model.device
        video = [s for s in states if s.now.video_moves]
        v_cond = [velocities[s.serial, True] for s in video]
        # a sample without an unconditional branch has guidance 1: flow_step does not look at what stands there
        v_uncond = [velocities.get((s.serial, False), v) for s, v in zip(video, v_cond, strict=True)]
        past = {}
        for name in ("last", "m1", "m2"):
            known = any(getattr(s, name) is not None for s in video)
            past[name] = torch.cat([_or(getattr(s, name), s.latents) for s in video]) if known else None
        none = torch.empty(0, dtype=torch.float32, device=device)

        def table(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
            return put(torch.tensor(values, dtype=dtype), device)

        sizes = [len(s.latents) if s.now.video_moves else 0 for s in states]
        lens = [len(s.tokens) for s in states]
        x, corrected, estimate, tokens = flow_step(
            torch.cat([none, *(s.latents for s in video)]),
            torch.cat([none, *v_cond]),
            torch.cat([none, *v_uncond]) if any((s.serial, False) in velocities for s in video) else None,
            self._floats([s.prepared.job.guidance for s in states]),
            self._floats([s.now.coefs for s in states]),
            past["last"],
            past["m1"],
            past["m2"],
            table(tiles(sizes), torch.int32),
            torch.cat([s.tokens for s in states]),
            drawn,
            self._floats([s.now.jump_prob for s in states]),
            table([s.seed for s in states]),
            table([s.now.index for s in states]),
            table(tiles(lens), torch.int32),
        )
        moved = zip(*(out.split(sizes) for out in (x, corrected, estimate)), tokens.split(lens), strict=True)
        words = fetch(tokens)
        for state, first, (latents, xc, m, ids) in zip(states, (first for first, _ in tiles(lens)), moved, strict=True):
            if state.now.video_moves:
                state.latents, state.estimate = latents, m
                if state.keeps_history:
                    state.last, state.m2, state.m1 = xc, state.m1, m
            if state.now.text_moves:
                state.tokens = ids
                state.told(functools.partial(_part, words, first, len(ids)))

    def _floats(self, values: Sequence[float | tuple[float, ...]]) -> Tensor:
        return put(torch.tensor(values, dtype=torch.float32), self.model.device)

    def _words(self, states: Sequence[State]) -> Tensor:
        """Tokens that the embedding has: those of a failed draw, -1, may not be known yet."""
        words = torch.cat([s.tokens for s in states])
        return words.clamp_min_(0) if self._looks_later else words


def _part(values: Callable[[], Tensor], first: int, count: int) -> Tensor:
    return values()[first : first + count]


def _blocks(condition: Sequence[Tensor], asking: Asking | None) -> ConditionKV:
    """`Packed.condition` as the model takes it."""
    count = 2 if asking is None else 3
    return [BlockCondition(*condition[i : i + count]) for i in range(0, len(condition), count)]


def _or(value: Tensor | None, other: Tensor) -> Tensor:
    return other if value is None else value
