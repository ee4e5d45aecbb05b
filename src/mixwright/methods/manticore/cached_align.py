"""Aligning on what frozen components have already said: each example is run through them once, however often it comes.

With one block, frozen components and frozen input projectors nothing that a component reads ever changes: its
embedding is frozen, the mixture weights stand still, and there is no earlier block. What it says before its head is
then a function of the tokens alone, and only z_m = (1 - alpha) Wout(y_m) + alpha pad(y_m), their mixture and the heads
are left to compute. With the input projectors in training (the paper's form), or with two blocks, this does not hold.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from mixwright.composition.eval_mode import eval_mode
from mixwright.composition.listening import listening
from mixwright.data.batches import Batches
from mixwright.data.collate import IGNORED, Batch
from mixwright.experts.blocks import BlockExperts
from mixwright.experts.projectors import resized
from mixwright.methods.manticore.model import HybridModel
from mixwright.training.progress import reporting

BLOCK = "blocks.0"
_TOLERANCE, _ROUGH = 1e-4, 0.05
"""Of the largest logit: in float32, and in less."""


class CachedAlign:
    """The supervised loss of a hybrid of one block, from boundary activations that are kept for each row of tokens.

    Rows are run in the order of the data, in the same company each time, so that a run that is resumed keeps the same
    bits. The first batch is also run through the whole hybrid, and must have the same logits: a component that does
    more after its head than hand over logits (a soft-cap, a scale) is refused with a ValueError.
    """

    def __init__(self, model: HybridModel, data: Sequence[Batches], store: "Store", *, quiet: bool = True) -> None:
        self.model, self.data, self.store, self.quiet = model, tuple(data), store, quiet
        self.places: dict[bytes, int] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed over the batch's targets."""
        assert model is self.model
        if not self.places:
            self._fill()
            self._prove(batch)
        logits = self.logits(batch).float().flatten(0, 1)
        return cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def logits(self, batch: Batch) -> Float[Tensor, "batch seq vocab"]:
        """Those of the hybrid, without running a component."""
        rows = [self.places[key] for key in _keys(batch)]
        width, device = batch.targets.shape[1], batch.targets.device
        mixture = self.model.mixtures[BLOCK]
        experts, weights = cast(BlockExperts, mixture.experts), self.model.row(BLOCK).weights().detach()
        stream: Tensor | None = None
        for m in weights.nonzero().flatten().tolist():
            y, alpha = self.store.read(m, rows, width).to(device), weights[m].to(device)
            straight = resized(y, experts.width)
            leave = experts.leave[m]
            z = straight if isinstance(leave, nn.Identity) else (1 - alpha) * leave(y) + alpha * straight
            stream = alpha * z if stream is None else stream + alpha * z
        assert stream is not None
        return self._heads(stream)

    def _heads(self, stream: Tensor) -> Tensor:
        weights = self.model.head_weights
        backbone, logits = self.model.backbone, cast(Tensor | None, None)
        for m in weights.nonzero().flatten().tolist():
            head: nn.Module = self.model.components[m].get_output_embeddings()  # type: ignore[operator]
            said = head(resized(stream, backbone.widths[m]))[..., : backbone.vocab_size]
            term = weights[m].to(said) * said
            logits = term if logits is None else logits + term
        assert logits is not None
        return logits

    @torch.no_grad()
    def _fill(self) -> None:
        device = next(self.model.parameters()).device
        parts = [(batches, part) for batches in self.data for part in batches.in_order()]
        with reporting("align: what components say", len(parts), 0, quiet=self.quiet) as report:
            for done, (batches, part) in enumerate(parts, 1):
                self._keep(batches.take(part).to(device))
                report.step(done, None)

    def _keep(self, batch: Batch) -> None:
        keys = _keys(batch)
        if all(key in self.places for key in keys):
            return
        said = boundary_activations(self.model, batch.inputs)
        for row, key in enumerate(keys):
            if key not in self.places:
                length = int(batch.inputs["attention_mask"][row].sum())
                self.places[key] = self.store.add({m: y[row, :length] for m, y in said.items()})

    @torch.no_grad()
    def _prove(self, batch: Batch) -> None:
        with eval_mode(self.model):
            whole = self.model(**batch.inputs, use_cache=False).logits
        kept = self.logits(batch).to(whole)
        real = batch.inputs["attention_mask"].bool()
        gap = float((whole - kept)[real].float().abs().max() / whole[real].float().abs().max().clamp_min(1.0))
        exact = whole.dtype == torch.float32 and not torch.is_autocast_enabled(whole.device.type)
        bound = _TOLERANCE if exact else _ROUGH
        if not gap <= bound:
            raise ValueError(
                f"config.align_cache: logits from kept activations differ by {gap:.2g} from those of the hybrid, so a "
                "component does more than its head says (a soft-cap, a scale), or reads more than its tokens. Set "
                "config.align_cache: off."
            )


@torch.no_grad()
def boundary_activations(model: HybridModel, inputs: Mapping[str, Any]) -> dict[int, Float[Tensor, "batch seq width"]]:
    """What each component that acts hands over at the end of the one block."""
    said: dict[int, Tensor] = {}
    with eval_mode(model), listening(model.mixtures[BLOCK], lambda component, _, out: said.update({component: out})):
        model(**inputs, use_cache=False)
    return said


class Store:
    """Rows of activations of each component, one after another, in memory or in files that vanish with the stage.

    `widths` by component; `tokens`: the room. Whoever keeps more is stopped by an assertion.
    """

    def __init__(self, widths: Mapping[int, int], tokens: int, dtype: torch.dtype, folder: Path | None = None) -> None:
        self.kept = {m: _room(tokens, width, dtype, folder, m) for m, width in widths.items()}
        self.ends = [0]

    def add(self, rows: Mapping[int, Float[Tensor, "seq width"]]) -> int:
        """Keep a row of each component; its number."""
        start = self.ends[-1]
        for m, row in rows.items():
            assert start + len(row) <= len(self.kept[m]), "more tokens than there is room for"
            self.kept[m][start : start + len(row)] = row.cpu()
        self.ends.append(start + len(next(iter(rows.values()))))
        return len(self.ends) - 2

    def read(self, component: int, rows: Sequence[int], width: int) -> Float[Tensor, "batch seq width"]:
        """These rows, with zeros behind the shorter ones."""
        kept = self.kept[component]
        found = pad_sequence([kept[self.ends[row] : self.ends[row + 1]] for row in rows], batch_first=True)
        return nn.functional.pad(found, (0, 0, 0, width - found.shape[1]))


def bytes_needed(model: HybridModel, tokens: int) -> int:
    """Of activations of so many tokens."""
    size = next(model.parameters()).element_size()
    return tokens * size * sum(model.backbone.widths)


def tokens_of(data: Sequence[Batches]) -> int:
    """Tokens of every example once."""
    return sum(int(b.take(part).inputs["attention_mask"].sum()) for b in data for part in b.in_order())


def _room(tokens: int, width: int, dtype: torch.dtype, folder: Path | None, component: int) -> Tensor:
    if folder is None:
        return torch.empty((tokens, width), dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"activations-{component}.bin"
    path.unlink(missing_ok=True)
    room = torch.from_file(str(path), shared=True, size=tokens * width, dtype=dtype).view(tokens, width)
    path.unlink()  # the mapping keeps it as long as it is needed, and no longer
    return room


def _keys(batch: Batch) -> list[bytes]:
    """What a row is known by: its tokens. Rows are padded on the right."""
    lengths = batch.inputs["attention_mask"].sum(-1).tolist()
    ids = batch.inputs["input_ids"].cpu()
    return [row[:length].numpy().tobytes() for row, length in zip(ids, lengths, strict=True)]
