"""Forwards of a small model without Python's part in them: what the model did for a composition of the batch is
recorded once and done again on the same memory."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules import module as modules_of_torch

from uvg_engine import backends
from uvg_engine.backends import native
from uvg_engine.model import UniViGU
from uvg_engine.model.univigu import PackedOutput
from uvg_engine.ops._alone import alone
from uvg_engine.ops._recording import NotRecordable, Recording

MOST_BYTES = 64 << 20  # that all recordings of an engine in a thread hold
_MOST_KEYS = 256  # that are remembered
_RECENT = 64  # forwards; untuned

Forward = Callable[[Sequence[Tensor], Sequence[Tensor]], PackedOutput]


@dataclass
class _Taken:
    """A recording, and the tensors it reads."""

    recording: Recording
    changing: list[Tensor]
    resting: list[Tensor]
    given: Callable[[], Tensor | None]  # the first of those that `resting` was copied from, while it lives
    used: int  # at which of all forwards last

    @property
    def num_bytes(self) -> int:
        return self.recording.num_bytes + _size(self.changing) + _size(self.resting)

    def replay(self, changing: Sequence[Tensor], resting: Sequence[Tensor]) -> bool:
        """With these values. False where a weight was written to since."""
        _fill(self.changing, changing)
        if resting and self.given() is not resting[0]:
            self.given = _nothing  # until all are copied
            _fill(self.resting, resting)
            self.given = weakref.ref(resting[0])
        return self.recording.replay()


class Replays(threading.local):
    """Forwards of a model: as they are at first, recorded when a key comes again, from then on replayed. A replay
    runs the same kernels on the same values, so it gives the same bits. Each thread has recordings of its own. Where
    one that was used of late had to go for another, none is taken for a while: taking one costs several forwards.

    Left as they are: forwards on a device, without the native core, with more than MOST_BYTES at work (where Python's
    part is small), with a gradient, under a profiler, mode, transform or autocast, with hooks on modules, with weights
    of a subclass of Tensor or in another dtype than that of the products. Seen before each replay: another model, other
    weights and buffers, other values in them, `config`, `int8` and the dtype; not seen: other attributes of its modules
    (an eps, a method).
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Taken | bool] = OrderedDict()  # True: came once, False: cannot be recorded
        self._state: Hashable = None  # of the model, that all recordings have seen
        self._forwards = self._record_from = 0

    def __reduce__(self) -> Any:
        return Replays, ()

    def run(
        self,
        model: UniViGU,
        key: Hashable,
        changing: Sequence[Tensor],
        resting: Sequence[Tensor],
        forward: Forward,
    ) -> PackedOutput:
        """forward(changing, resting).

        changing, resting: the tensors that the forward reads, but for the weights of the model; where the first one of
        `resting` is the object that it was, all have the values that they had. key: all else that it depends on; with
        one key, shapes and dtypes are the same. The tensors of the result are overwritten by the next call with this
        key.
        """
        if not self._plain(model, changing):
            return forward(changing, resting)
        key = (key, torch.get_num_threads(), torch.is_inference_mode_enabled(), backends.names(), backends.forced())
        known = self._known.get(key)
        self._forwards += 1
        if isinstance(known, _Taken):
            self._known.move_to_end(key)
            known.used = self._forwards
            if known.replay(changing, resting):
                return known.recording.result
        elif known and self._forwards >= self._record_from:
            own = [value.clone() for value in changing], [value.clone() for value in resting]
            try:
                recording = Recording(lambda: forward(*own), MOST_BYTES - sum(map(_size, own)))
            except NotRecordable:
                self._keep(key, False)
                return forward(changing, resting)
            given = weakref.ref(resting[0]) if resting else _nothing
            self._keep(key, _Taken(recording, *own, given, self._forwards))
            return recording.result
        if known is not False:
            self._keep(key, True)
        return forward(changing, resting)

    def _plain(self, model: UniViGU, changing: Sequence[Tensor]) -> bool:
        """Whether only the kernels have to see the calls. Forgets all recordings where the model is another one."""
        if native.cpu() is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if not alone(tuple(changing)) or modules_of_torch._has_any_global_hook():
            return False
        found: list[Tensor | None] = [model.rotary_emb_text.table(1)]
        modules: list[Any] = [model]
        for module in modules:  # it grows
            if module is None:
                continue
            if module._forward_hooks or module._forward_pre_hooks:
                return False
            found += [*module._parameters.values(), *module._buffers.values()]
            modules += module._modules.values()
        tensors = [x for x in found if x is not None]
        if not {type(x) for x in tensors} <= {Tensor, Parameter}:
            return False
        state = (model, model.config, model.int8, model.dtype, *((x.data_ptr(), x.dtype, x.stride()) for x in tensors))
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
            if isinstance(oldest, _Taken):
                held -= oldest.num_bytes
                if self._forwards - oldest.used < _RECENT:
                    self._record_from = self._forwards + _RECENT


def _nothing() -> None:
    return None


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _fill(own: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for mine, value in zip(own, values, strict=True):
        mine.copy_(value)
