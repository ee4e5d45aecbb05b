"""What a stage wants watched while it trains: numbers for the log, and alarms for the person who reads it."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from mixwright.training.stage import Stage

_LOGGER = logging.getLogger(__name__)


class Watcher:
    """Asks a stage's `watch` for its numbers. An alarm is a warning when it sets in, and again if it comes back."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._ringing: frozenset[str] = frozenset()

    @torch.no_grad()
    def look(self, model: nn.Module, step: int) -> Mapping[str, float]:
        """The numbers of this moment."""
        if self.stage.watch is None:
            return {}
        numbers = self.stage.watch(model)
        alarms = {} if self.stage.alarms is None else self.stage.alarms(numbers)
        for name, meaning in alarms.items():
            if name not in self._ringing:
                _LOGGER.warning("stage %s, step %d: %s: %s", self.stage.name, step, name, meaning)
        self._ringing = frozenset(alarms)
        return numbers
