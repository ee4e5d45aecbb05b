"""Another vocabulary for a copy of a model: new rows out of those that it has."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.prune import copied
from mixwright.backbones.tokenizers import fingerprint, rows_of
from mixwright.errors import IncompatibleExpert

_MARK = "vocabulary_of"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_vocabulary(model: nn.Module, own: Any, shared: Any, name: str = "") -> nn.Module:
    """A copy of `model`, which reads the tokens of `own`, that reads those of `shared`; nothing of `model` is changed.

    Rows are copied for tokens that both have. For another, the embedding's is the mean of the rows of the pieces into
    which `own` splits the token's text (as in mergekit's tokensurgeon), and the head's that of the first piece, with
    which the model begins to say it; a head tied to the embedding stays tied. All other tensors are the model's own.
    Raises IncompatibleExpert (VOCABULARY) where more than these two depend on the vocabulary.
    """
    name = name or type(model).__name__
    new: Any = copied(model)
    embedding, head = new.get_input_embeddings(), new.get_output_embeddings()
    old, size = int(embedding.weight.shape[0]), len(shared)
    _refuse_others(new, embedding, head, name)
    rows = rows_of(own, shared)
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(means(embedding.weight, rows))
    embedding.num_embeddings, embedding.padding_idx = size, None
    first = [group[:1] for group in rows]
    head.weight = embedding.weight if tied else nn.Parameter(means(head.weight, first))
    if getattr(head, "bias", None) is not None:
        head.bias = nn.Parameter(means(head.bias.unsqueeze(-1), first).squeeze(-1))
    head.out_features = size
    _tell(new, old, size, shared)
    return new


def vocabulary_of(model: nn.Module) -> str | None:
    """The fingerprint of the tokenizer whose vocabulary the model was given; None for one that has its own."""
    return getattr(getattr(model, "config", None), _MARK, None)


@torch.no_grad()
def means(table: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Row t: the mean of the rows `rows[t]` of `table`, and of all rows where that is empty."""
    flat = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long, device=table.device)
    counts = torch.tensor([len(group) for group in rows], device=table.device)
    owner = torch.repeat_interleave(torch.arange(len(rows), device=table.device), counts)
    sums = torch.zeros(len(rows), table.shape[1], dtype=torch.float32, device=table.device)
    sums.index_add_(0, owner, table[flat].float())
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    mean[counts == 0] = table.float().mean(0)
    return mean.to(table.dtype)


def _refuse_others(model: nn.Module, embedding: nn.Module, head: nn.Module, name: str) -> None:
    rows = embedding.weight.shape[0]  # type: ignore[union-attr]
    known = {id(value) for part in (embedding, head) for value in part.parameters()}
    others = [key for key, value in model.named_parameters() if value.shape[:1] == (rows,) and id(value) not in known]
    tables = [key for key in others if "embed" in key or "head" in key]
    if tables:
        raise IncompatibleExpert(
            "VOCABULARY",
            name,
            f"{tables[0]} depends on the vocabulary too, and only embedding and head can be replaced; choose this "
            "component's tokenizer as the shared one, or leave the component out.",
        )


def _tell(model: Any, old: int, size: int, shared: Any) -> None:
    """Write the new size and special tokens wherever the model keeps them."""
    for module in model.modules():
        if vars(module).get("vocab_size") == old:
            module.vocab_size = size
    generation = getattr(model, "generation_config", None)
    for config in {
        id(c): c for c in (model.config, model.config.get_text_config(), generation) if c is not None
    }.values():
        if getattr(config, "vocab_size", None) is not None:
            config.vocab_size = size
        for field in _IDS:
            if hasattr(config, field):
                setattr(config, field, getattr(shared, field, None))
    setattr(model.config, _MARK, fingerprint(shared))
