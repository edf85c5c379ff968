"""Time embeddings and modulations of all steps of a job, made at its start."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uvg_engine.backends.devices import put
from uvg_engine.flow import Step
from uvg_engine.model import UniViGU
from uvg_engine.model.univigu import TimeTable


def times_of(steps: Sequence[Step]) -> tuple[tuple[float, float], ...]:
    """(video, text) time of each step: jobs with equal ones have the same tables."""
    return tuple((step.video_time, step.text_time) for step in steps)


class TimeTables:
    """Rows for every time of a job, each time computed once and alone: no bit depends on the other steps."""

    def __init__(self, model: UniViGU, steps: Sequence[Step]) -> None:
        times = zip(*times_of(steps), strict=True)
        self._places = [{time: i for i, time in enumerate(dict.fromkeys(each))} for each in times]
        self._tables = model.time_tables(
            *(put(torch.tensor([*known], dtype=torch.float32), model.device) for known in self._places)
        )

    def row(self, modality: int, time: float) -> TimeTable:
        """(temb [1, D], modulation [1, 6, D]) of a time; views."""
        place = self._places[modality][time]
        temb, modulation = self._tables[modality]
        return temb[place : place + 1], modulation[place : place + 1]


def joined(rows: Sequence[TimeTable]) -> TimeTable:
    """Of several samples; the row itself where there is one."""
    if len(rows) == 1:
        return rows[0]
    return torch.cat([temb for temb, _ in rows]), torch.cat([modulation for _, modulation in rows])
