"""What components hand to each other: lengths of hidden states before and after projection, and how much a component's
own stream is still itself inside the hybrid.

Runs of layers that were trained apart speak different languages: a boundary where the lengths jump, or where a
component's states no longer resemble its own, is where projectors have failed or learned something else.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.composition.eval_mode import eval_mode
from mixwright.composition.listening import Hear, listening
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.evaluation.hybrid_documents import Documents
from mixwright.experts.blocks import BlockExperts


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """One component at one slot: root mean squares over tokens and channels.

    `stream`: of the hybrid's stream as it comes in (None at the embedding). `given`: of what the component's layers are
    handed, after the way in. `returned`: of what they give, before the way out. `own`: of what they give when the
    component runs alone. `likeness`: linear CKA of `returned` and `own`, 1 where they are the same up to rotation and
    scale. `mixed`: of the stream that leaves the slot.
    """

    slot: str
    component: str
    stream: float | None
    given: float | None
    returned: float
    own: float
    likeness: float | None
    mixed: float


class _Moments:
    """Sums over tokens of one pair of states; enough for root mean squares and for linear CKA."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, ours: Float[Tensor, "tokens d"], own: Float[Tensor, "tokens d"]) -> None:
        self.count += len(ours)
        both = {"x": ours.double(), "y": own.double()}
        for name, value in both.items():
            self._sum(name, value.sum(0))
        for pair in ("xx", "yy", "xy"):
            self._sum(pair, both[pair[0]].T @ both[pair[1]])

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def likeness(self) -> float | None:
        """||Y'X||^2 / (||X'X|| ||Y'Y||) of centred states (Kornblith et al. 2019, linear CKA)."""

        def centred(pair: str) -> Tensor:
            return self.sums[pair] - torch.outer(self.sums[pair[0]], self.sums[pair[1]]) / self.count

        scale = float(centred("xx").norm() * centred("yy").norm())
        return float(centred("xy").square().sum()) / scale if scale > 0 else None


class _Sizes:
    """Mean squares by name."""

    def __init__(self) -> None:
        self._sums: dict[Any, tuple[float, int]] = {}

    def add(self, key: Any, values: Tensor) -> None:
        total, count = self._sums.get(key, (0.0, 0))
        self._sums[key] = (total + float(values.double().square().sum()), count + values.numel())

    def rms(self, key: Any) -> float | None:
        total, count = self._sums.get(key, (0.0, 0))
        return (total / count) ** 0.5 if count else None


def boundaries(model: ComposedModel, documents: Documents, batches: int = 2) -> list[Boundary]:
    """Of every slot but the head, and every component that runs there, on the first `batches` batches."""
    sizes, pairs = _Sizes(), dict[tuple[str, int], _Moments]()
    slots = list(model.mixtures)[:-1]
    with eval_mode(model):
        for batch in documents.batches[:batches]:
            _look(model, slots, batch, sizes, pairs)
    return [
        Boundary(
            slot=slot,
            component=model.experts[m],
            stream=sizes.rms(("stream", slot)),
            given=sizes.rms(("given", slot, m)),
            returned=sizes.rms(("returned", slot, m)) or 0.0,
            own=sizes.rms(("own", slot, m)) or 0.0,
            likeness=moments.likeness(),
            mixed=sizes.rms(("mixed", slot)) or 0.0,
        )
        for (slot, m), moments in sorted(pairs.items(), key=lambda found: (slots.index(found[0][0]), found[0][1]))
    ]


def _look(
    model: ComposedModel,
    slots: Sequence[str],
    batch: Batch,
    sizes: _Sizes,
    pairs: dict[tuple[str, int], _Moments],
) -> None:
    """One batch through the hybrid, then through each component that ran in it."""
    device = next(model.backbone.parameters()).device
    placed = batch.to(device)
    mask = placed.inputs.get("attention_mask")
    real = torch.ones_like(placed.targets, dtype=torch.bool) if mask is None else mask.bool()
    with _listening(model, slots) as heard:
        model(**placed.inputs, use_cache=False)
    for slot in slots:
        stream, mixed = heard.stream.get(slot), heard.mixed[slot]
        if stream is not None:
            sizes.add(("stream", slot), stream[real])
        sizes.add(("mixed", slot), mixed[real])
        for m, (given, returned) in heard.ran.get(slot, {}).items():
            if given is not None:
                sizes.add(("given", slot, m), given[real])
            sizes.add(("returned", slot, m), returned[real])
    for m in sorted({m for ran in heard.ran.values() for m in ran}):
        with model.only(model.experts[m]), _listening(model, slots) as alone:
            model(**placed.inputs, use_cache=False)
        for slot in slots:
            if m in heard.ran.get(slot, {}):
                own = alone.ran[slot][m][1][real]
                sizes.add(("own", slot, m), own)
                pairs.setdefault((slot, m), _Moments()).add(heard.ran[slot][m][1][real], own)


class _Heard:
    """What went by in one pass, by slot: the stream in and out, and what each component was given and gave back."""

    def __init__(self) -> None:
        self.stream: dict[str, Tensor] = {}
        self.mixed: dict[str, Tensor] = {}
        self.ran: dict[str, dict[int, tuple[Tensor | None, Tensor]]] = {}


@contextmanager
def _listening(model: ComposedModel, slots: Sequence[str]) -> Generator[_Heard]:
    """Hear what the slots' experts let run, and what the mixtures make of it."""
    heard = _Heard()

    def hear(slot: str) -> Hear:
        return lambda component, hidden, out: heard.ran.setdefault(slot, {}).update({component: (hidden, out)})

    def note(slot: str) -> Any:
        def hook(mixture: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            del mixture
            if isinstance(model.mixtures[slot].experts, BlockExperts):
                heard.stream[slot] = args[0]
            heard.mixed[slot] = out

        return hook

    with ExitStack() as stack:
        for slot in slots:
            stack.enter_context(listening(model.mixtures[slot], hear(slot)))
            stack.callback(model.mixtures[slot].register_forward_hook(note(slot)).remove)
        yield heard
