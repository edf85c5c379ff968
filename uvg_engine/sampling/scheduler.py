"""Continuous batching: requests join when there is room, each at its own step, and leave when they are done."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from uvg_engine.sampling.loop import Loop
from uvg_engine.sampling.prepare import Prepared, prepare
from uvg_engine.sampling.requests import CaptionResult, GenerateResult, JointResult, Request, Result
from uvg_engine.sampling.savings import Savings
from uvg_engine.sampling.state import State
from uvg_engine.sampling.trajectory import Recorder
from uvg_engine.surroundings import cpu_by_default

if TYPE_CHECKING:
    from uvg_engine.sampling.engine import Engine

Callback = Callable[[int, int, Request], None]


class SamplingError(RuntimeError):
    """A sound request could not be finished, because of the model's own numbers; its neighbours are not touched."""


class Handle:
    """A submitted request. `request` has its seed filled in; `result` is there once `done`."""

    def __init__(self, prepared: Prepared) -> None:
        self.request = prepared.request
        self.num_steps = len(prepared.job.steps)
        self.num_rows = prepared.num_rows
        self._prepared: Prepared | None = prepared  # until it starts
        self._state: State | None = None  # while it runs
        self._recorder: Recorder | None = None
        self._result: Result | None = None
        self._error: Exception | None = None
        self._steps_done = 0

    @property
    def steps_done(self) -> int:
        """Steps done, of `num_steps`."""
        return self._steps_done if self._state is None else self._state.step

    @property
    def done(self) -> bool:
        """Whether `result` can be asked for."""
        return self._result is not None or self._error is not None

    @property
    def result(self) -> Result:
        """The result. Raises what went wrong with this request, and SamplingError where it is not done."""
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise SamplingError(f"request must be done, got {self.steps_done} of {self.num_steps} steps")
        return self._result


class Scheduler:
    """Runs any mix of jobs, sizes and step counts on one engine. Not for several threads at once.

    max_rows: most rows of the packed matrix (both streams, both branches of guidance) in a step; requests start in the
    order of submission as room comes free, and one that is larger by itself runs alone. savings: see Savings.
    callback(done, total, request): after each step of each request. None of these changes a result.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_rows: int | None = None,
        savings: Savings | None = None,
        callback: Callback | None = None,
    ) -> None:
        self.engine, self.callback = engine, callback
        self.max_rows = engine.max_rows if max_rows is None else max_rows
        check_max_rows(self.max_rows)
        self.savings = engine.savings if savings is None else savings
        with cpu_by_default():
            self._loop = Loop(engine, self.savings)
        self._waiting: deque[Handle] = deque()
        self._active: list[Handle] = []
        self._unsettled: deque[Handle] = deque()  # have moved, and step() was interrupted before it looked at them
        self._finished: list[Handle] = []  # not yet returned by step()

    @property
    def num_waiting(self) -> int:
        """Requests submitted but not started."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Requests under way."""
        return len(self._active)

    @property
    def has_room(self) -> bool:
        """Whether one more request may be able to start at the next step."""
        return sum(handle.num_rows for handle in (*self._active, *self._waiting)) < self.max_rows

    @property
    def idle(self) -> bool:
        """Nothing to do, and nothing left to tell."""
        return not self._waiting and not self._active and not self._finished

    def submit(self, request: Request) -> Handle:
        """Check a request and queue it. Raises ValueError on one that cannot be run, and warns, as `prepare` tells."""
        with cpu_by_default():
            handle = Handle(prepare(request, self.engine))
        self._waiting.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Forget a request; its result is then a SamplingError. Nothing happens to one that is done.

        Raises ValueError on a handle of another scheduler.
        """
        if handle.done:
            return
        if handle in self._waiting:
            self._waiting.remove(handle)
        elif handle in self._active:
            self._active.remove(handle)
        else:
            raise ValueError("handle must be one of this scheduler's, got another's")
        self._retire(handle, error=SamplingError("request was cancelled"))

    def step(self) -> list[Handle]:
        """Start what has room, advance every active request by one step. Returns those that are done, in order.

        A request that cannot be started or finished is done as well: its `result` raises. An error of the whole batch
        (no memory, say) or of the callback, and Ctrl-C in an encoder or a codec, are raised here; no request is lost by
        them.
        """
        with cpu_by_default():
            if not self._unsettled:
                self._admit()
                self._loop.advance([self._state(handle) for handle in self._active])
                self._unsettled.extend(self._active)
            running = list(self._active)
            while self._unsettled:
                if not self._unsettled[0].done:
                    self._settle(self._unsettled[0])
                self._unsettled.popleft()
        self._active = [handle for handle in running if not handle.done]
        if not self._active:
            self._loop.forget()
        if self.callback is not None:
            for handle in running:
                self.callback(handle.steps_done, handle.num_steps, handle.request)
        finished, self._finished = self._finished, []
        return finished

    def drain(self) -> Iterator[Handle]:
        """Step until nothing is left; yields the requests as they are done."""
        while not self.idle:
            yield from self.step()

    def _admit(self) -> None:
        """Start waiting requests while there is room."""
        rows = sum(handle.num_rows for handle in self._active)
        while self._waiting and (not self._active or rows + self._waiting[0].num_rows <= self.max_rows):
            handle = self._waiting[0]
            try:
                self._start(handle)
            except Exception as error:  # one request's encoder must not end the others
                self._retire(handle, error=error)
                self._finished.append(handle)
            else:
                self._active.append(handle)
                rows += handle.num_rows
            self._waiting.popleft()

    def _start(self, handle: Handle) -> None:
        prepared = handle._prepared
        assert prepared is not None
        state = State(prepared, self.engine, self.savings)
        if prepared.request.trajectory:
            kind = prepared.request.kind
            handle._recorder = Recorder(
                handle.num_steps,
                prepared.request.trajectory,
                self._decode_video if kind != "caption" else None,
                (lambda ids: self.engine.decode(ids, stop_at_eos=False)) if kind != "generate" else None,
            )
        handle._state, handle._prepared = state, None

    def _settle(self, handle: Handle) -> None:
        """After a step: record it, and take the result where it was the last."""
        if handle._recorder is not None or self._state(handle).done:  # what the step left is read now
            self._state(handle).look()  # a device that failed concerns all requests: raised by `step`
        try:
            self._tell(handle, self._state(handle))
        except Exception as error:  # told by handle.result: it concerns one request only
            self._retire(handle, error=error)
        if handle.done:
            self._finished.append(handle)

    def _tell(self, handle: Handle, state: State) -> None:
        if state.failed:
            raise SamplingError("the model gave no distribution for a token (NaN or infinite logits)")
        if handle._recorder is not None:
            latent = state.estimate.view(state.prepared.latent_shape)
            handle._recorder.record(state.step, 1 - state.steps[state.step - 1].sigma_next, latent, state.tokens)
        if state.done:
            self._retire(handle, result=self._result(handle, state))

    @staticmethod
    def _retire(handle: Handle, *, result: Result | None = None, error: Exception | None = None) -> None:
        """Store the outcome and let go of everything else."""
        if error is not None:  # lives as long as the handle, and with it what the functions that failed held
            traceback.clear_frames(error.__traceback__)
        handle._steps_done = handle.steps_done
        handle._result, handle._error = result, error
        handle._state = handle._prepared = handle._recorder = None

    @staticmethod
    def _state(handle: Handle) -> State:
        assert handle._state is not None
        return handle._state

    def _decode_video(self, latent: Tensor) -> Tensor:
        if not bool(latent.isfinite().all()):
            raise SamplingError("the model's velocity led to a video that is not finite (NaN or infinity)")
        return self.engine.codec.decode(latent).cpu()

    def _result(self, handle: Handle, state: State) -> Result:
        request, fps = state.prepared.request, self.engine.defaults.fps
        trajectory = handle._recorder.finish() if handle._recorder is not None else None
        ids = tuple(state.tokens.tolist())
        if request.kind == "caption":
            return CaptionResult(self.engine.decode(ids), ids, state.seed, trajectory)
        prompt = request.prompt or ""
        latent = state.latents.view(state.prepared.latent_shape)
        frames, latent = self._decode_video(latent), latent.to("cpu", copy=True)  # not a piece of the batch's memory
        if request.kind == "generate":
            return GenerateResult(prompt, frames, fps, state.seed, latent, trajectory)
        return JointResult(prompt, frames, fps, self.engine.decode(ids), ids, state.seed, latent, trajectory)


def check_max_rows(value: int) -> None:
    """Raise ValueError unless it is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"max_rows must be an integer of at least 1, got {value!r}")
