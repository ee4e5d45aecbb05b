"""What a backbone's layers read on some text."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.methods.peer.feed_forward import Place
from mixwright.routers.retriever import counted_tokens
from mixwright.routing import Condition


def layer_inputs(
    backbone: nn.Module, places: Mapping[str, Place], data: Any, tokens: int, seed: int
) -> dict[str, Float[Tensor, "tokens width"]]:
    """Path -> the inputs of each layer on at most `tokens` real tokens of `data`, in a random order from `seed`.

    `data`: batches of the backbone's inputs, as mappings, token ids, `Batch` or `Batches`. Padding is left out where
    the batch has an `attention_mask` and the layer reads all of its tokens. Raises ValueError where a layer read none.
    """
    kept: dict[str, list[Tensor]] = {path: [] for path in places}
    mask: list[Tensor | None] = [None]

    def listener(path: str) -> Any:
        def listen(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            counted = counted_tokens(x.shape[:-1], Condition(token_mask=mask[0]))
            kept[path].append(x.flatten(0, -2) if counted is None else x[counted])

        return listen

    hooks = [
        backbone.get_submodule(place.entry or path).register_forward_pre_hook(listener(path))
        for path, place in places.items()
    ]
    try:
        with torch.no_grad(), eval_mode(backbone):
            for inputs in _passes(data):
                given = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
                mask[0] = given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None
                backbone(**inputs) if isinstance(inputs, Mapping) else backbone(inputs)
                if all(sum(map(len, found)) >= tokens for found in kept.values()):
                    break
    finally:
        for hook in hooks:
            hook.remove()
    draw = torch.Generator().manual_seed(seed)
    return {path: _some(path, found, tokens, draw) for path, found in kept.items()}


def _some(path: str, found: list[Tensor], tokens: int, draw: torch.Generator) -> Tensor:
    if not sum(map(len, found)):
        raise ValueError(f"data: {path} read no token of it; give at least one batch of the backbone's inputs.")
    rows = torch.cat(found)
    return rows[torch.randperm(len(rows), generator=draw)[:tokens].to(rows.device)]


def _passes(data: Any) -> Iterator[Any]:
    """Each batch as mappings of arguments, or as ids."""
    if isinstance(data, Batches):
        yield from (data.take(part).inputs for part in data.in_order())
        return
    if isinstance(data, Tensor | Batch | Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            f"data: expected batches, such as a list of mappings of the backbone's inputs, got one "
            f"{type(data).__name__}; put it into a list."
        )
    for batch in data:
        yield batch.inputs if isinstance(batch, Batch) else batch
