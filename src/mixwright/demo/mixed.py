"""Documents that change their domain half-way: no single expert can be right for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.demo.corpus import Domain
from mixwright.evaluation.scores import TokenTask
from mixwright.evaluation.systems import System
from mixwright.routing import Routing

PASSAGE = 64


@dataclass(frozen=True, kw_only=True)
class MixedDocuments:
    """`tokens` (documents, 2 * 64), and whose text each token is: `domains` (documents, 2), in the pool's order."""

    tokens: Int[Tensor, "documents seq"]
    domains: Int[Tensor, "documents two"]

    def task(self) -> TokenTask:
        """Predict every next token."""
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        batch = Batch(
            "causal", {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}, targets, targets.numel()
        )
        return TokenTask("mixed documents", [batch])

    def oracle(self, num_experts: int) -> System:
        """Every token goes to its own domain's expert, which nobody knows beforehand."""
        owners = self.domains.repeat_interleave(PASSAGE, 1)[:, : self.tokens.shape[1] - 1]
        weights = torch.nn.functional.one_hot(owners, num_experts).float()
        return System("oracle", lambda model: model.routed_by(Routing(weights, num_experts)))


def mix(domains: Sequence[Domain], tokenizer: Any, count: int, seed: int = 0) -> MixedDocuments:
    """`count` documents of two passages each, out of the held-out text of two different domains."""
    held_out = [torch.tensor(_tokens(domain, tokenizer)) for domain in domains]
    draw = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    owners: list[Tensor] = []
    for _ in range(count):
        pair = torch.randperm(len(domains), generator=draw)[:2]
        rows.append(torch.cat([_passage(held_out[int(which)], draw) for which in pair]))
        owners.append(pair)
    return MixedDocuments(tokens=torch.stack(rows), domains=torch.stack(owners))


def own_domain(domain: Domain, tokenizer: Any, most: int = 24) -> TokenTask:
    """The domain's own held-out text, in rows of two passages."""
    tokens = _tokens(domain, tokenizer)
    length = 2 * PASSAGE
    rows = torch.tensor(tokens[: len(tokens) // length * length]).reshape(-1, length)[:most]
    return TokenTask(domain.name, [MixedDocuments(tokens=rows, domains=rows[:, :2]).task().batches[0]])


def uniform(model: ComposedModel, strength: float) -> System:
    """All experts at `strength` / E: the mean of the products, times `strength`."""
    count = len(model.experts)
    routing = Routing(torch.full((1, count), strength / count), count)
    return System(f"merged, times {strength:g}", lambda m: m.routed_by(routing))


def _tokens(domain: Domain, tokenizer: Any) -> list[int]:
    return [token for piece in domain.held_out for token in tokenizer(piece)["input_ids"]]


def _passage(tokens: Tensor, draw: torch.Generator) -> Tensor:
    start = int(torch.randint(0, len(tokens) - PASSAGE, (1,), generator=draw))
    return tokens[start : start + PASSAGE]
