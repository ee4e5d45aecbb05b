"""Sites that see one input tensor share its standardisation and one matrix product: query, key and value; gate and up.

Which sites those are is found when a model is composed and said with `share`. Whether they really see one tensor is
checked at every pass, by identity; where they do not, each scores for itself.
"""

from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn.functional import linear

from mixwright.ops.standardise import standardise
from mixwright.routers.base import AbstractScores
from mixwright.routers.gate import PrototypeScores, prototype_rows
from mixwright.routers.remembered import Remembered, version


def share(scores: Iterable[AbstractScores]) -> "PrototypeGroup | None":
    """Let these scores, of sites that read the same tensor, be computed together. Other kinds than prototypes, and
    prototypes of another width or device than the first, are left alone; None where fewer than two remain."""
    given = [member for member in scores if isinstance(member, PrototypeScores)]
    first = given[0].prototypes if given else None
    members = [
        member
        for member in given
        if first is not None
        and (member.prototypes.shape[1:], member.prototypes.device, member.prototypes.dtype)
        == (first.shape[1:], first.device, first.dtype)
    ]
    if len(members) < 2:
        return None
    group = PrototypeGroup(members)
    for member in members:
        member.group = group
    return group


class PrototypeGroup:
    """The scores of several sites for one input: computed for all by the first to ask, handed out once to each.

    The input is held weakly, and what waits for a site that never asks goes when the input does. An input that records
    gradients is not shared, so that each site's graph stays its own. A tensor made in inference mode does not tell
    when it is written to: there, an input that is changed in place between two sites goes unnoticed.
    """

    def __init__(self, members: Iterable[PrototypeScores]) -> None:
        self.members = tuple(members)
        self._rows = Remembered(prototype_rows)
        self._input: ReferenceType[Tensor] | None = None
        self._version: int | None = None
        self._waiting: dict[int, Tensor] = {}

    def scores(self, member: PrototypeScores, x: Tensor) -> Tensor | None:
        """The scores of one member for `x`, or None where they have to be computed alone."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return None
        seen = self._input is not None and self._input() is x and self._version == version(x)
        if not (seen and id(member) in self._waiting):
            self._compute(x)
        return self._waiting.pop(id(member))

    def _compute(self, x: Tensor) -> None:
        inputs = standardise(x)
        rows = self._rows(*(member.prototypes for member in self.members), dtype=inputs.dtype)
        columns = linear(inputs, rows)
        waiting: dict[int, Tensor] = {}
        start = 0
        for member in self.members:
            waiting[id(member)] = columns[..., start : start + member.num_experts]
            start += member.num_experts
        self._input, self._version, self._waiting = ref(x, self._forget), version(x), waiting

    def _forget(self, dead: "ReferenceType[Tensor]") -> None:
        if self._input is dead:
            self._input, self._waiting = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_input": None, "_version": None, "_waiting": {}}
