"""Forwards of a small model without Python's part in them: what the model did for a composition of the batch is
recorded once and done again on the same memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uvg_engine import backends
from uvg_engine.backends import native
from uvg_engine.model import UniViGU
from uvg_engine.model.univigu import PackedOutput
from uvg_engine.ops._recording import NotRecordable, Recording
from uvg_engine.ops._registry import alone

MOST_BYTES = 64 << 20  # that all recordings of a loop hold
_MOST_KEYS = 256  # that are remembered

Forward = Callable[[Sequence[Tensor], Sequence[Tensor]], PackedOutput]


@dataclass
class _Taken:
    """A recording, and the tensors it reads."""

    recording: Recording
    changing: list[Tensor]
    resting: list[Tensor]
    given: Sequence[Tensor]  # what `resting` was copied from

    @property
    def num_bytes(self) -> int:
        return self.recording.num_bytes

    def replay(self, changing: Sequence[Tensor], resting: Sequence[Tensor]) -> bool:
        """With these values. False where a weight was written to since."""
        _fill(self.changing, changing)
        if self.given is not resting:
            _fill(self.resting, resting)
            self.given = resting
        return self.recording.replay()


class Replays(threading.local):
    """Forwards of one model: as they are at first, recorded when a key comes again, from then on replayed. A replay
    runs the same kernels on the same values, so it gives the same bits. Each thread has recordings of its own.

    Left as they are: forwards on a device, without the native core, with more than MOST_BYTES at work (where Python's
    part is small), with a gradient, under a profiler, mode, transform or autocast, of modules with hooks.
    """

    def __init__(self, model: UniViGU) -> None:
        self._model = model
        self._known: OrderedDict[Hashable, _Taken | bool] = OrderedDict()  # True: came once, False: cannot be recorded
        self._state: Hashable = None  # of the model, that all recordings have seen

    def __reduce__(self) -> Any:
        return Replays, (self._model,)

    def run(
        self,
        key: Hashable,
        changing: Sequence[Tensor],
        resting: Sequence[Tensor],
        forward: Forward,
    ) -> PackedOutput:
        """forward(changing, resting).

        changing, resting: the tensors that the forward reads, but for the weights; one object `resting` has the same
        values always. key: all else that it depends on; with one key, shapes and dtypes are the same. The tensors of
        the result are overwritten by the next call with this key.
        """
        if not self._plain(changing):
            return forward(changing, resting)
        key = (key, torch.get_num_threads(), torch.is_inference_mode_enabled(), backends.names(), backends.forced())
        known = self._known.get(key)
        if isinstance(known, _Taken):
            self._known.move_to_end(key)
            if known.replay(changing, resting):
                return known.recording.result
        elif known:
            own = [value.clone() for value in changing], [value.clone() for value in resting]
            try:
                recording = Recording(lambda: forward(*own), MOST_BYTES)
            except NotRecordable:
                self._keep(key, False)
                return forward(changing, resting)
            self._keep(key, _Taken(recording, *own, resting))
            return recording.result
        if known is not False:
            self._keep(key, True)
        return forward(changing, resting)

    def _plain(self, changing: Sequence[Tensor]) -> bool:
        """Whether only the kernels have to see the calls. Forgets all recordings where the model is another one."""
        if native.cpu() is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if not alone(tuple(changing)):
            return False
        model, places = self._model, []
        modules: list[Any] = [model]
        for module in modules:  # it grows
            if module._forward_hooks or module._forward_pre_hooks:
                return False
            places += [*module._parameters.values(), *module._buffers.values()]
            modules += module._modules.values()
        places.append(model.rotary_emb_text.table(1))
        state = (model.int8, model.dtype, *(None if x is None else (x.data_ptr(), x.dtype) for x in places))
        if state != self._state:
            self._known.clear()
            self._state = state
        return True

    def _keep(self, key: Hashable, value: _Taken | bool) -> None:
        """The longest unused go first."""
        self._known[key] = value
        held = sum(each.num_bytes for each in self._known.values() if isinstance(each, _Taken))
        while held > MOST_BYTES or len(self._known) > _MOST_KEYS:
            _, oldest = self._known.popitem(last=False)
            held -= oldest.num_bytes if isinstance(oldest, _Taken) else 0


def _fill(own: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for mine, value in zip(own, values, strict=True):
        mine.copy_(value)
