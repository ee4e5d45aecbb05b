"""Any causal language model of transformers as embedding, layers and head, found without code per family."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mixwright.errors import IncompatibleExpert


@dataclass(frozen=True, slots=True)
class Parts:
    """Where a component's parts are. `layers`: the path of the list of its layers."""

    layers: str
    num_layers: int
    embedding: nn.Module
    head: nn.Module

    def layer(self, model: nn.Module, index: int) -> nn.Module:
        """Layer number `index` of `model`."""
        return model.get_submodule(f"{self.layers}.{index}")


def parts_of(model: nn.Module, name: str = "component") -> Parts:
    """The parts of a causal language model. Raises IncompatibleExpert (PARTS) where they can't be told apart."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = getattr(text, "num_hidden_layers", None)
    lists: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and wanted
    ]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not lists or not isinstance(embedding, nn.Module) or not isinstance(head, nn.Module):
        lacking = "layers" if not lists else "input embedding" if embedding is None else "language model head"
        raise IncompatibleExpert(
            "PARTS",
            name,
            f"{type(model).__name__} shows no {lacking}; expected a causal language model of transformers, with a list "
            f"of {wanted} layers, an embedding and a head.",
        )
    path = min(lists, key=_depth)
    return Parts(path, int(wanted or 0), embedding, head)


def _depth(path: str) -> int:
    return path.count(".")


def split(num_layers: int, num_blocks: int) -> tuple[range, ...]:
    """Layers `round(i L / K)` to `round((i + 1) L / K)` for each block i: each once, lengths differing by at most 1.

    Raises ValueError where a block would have no layer.
    """
    if not 1 <= num_blocks <= num_layers:
        raise ValueError(
            f"num_blocks={num_blocks}: expected 1 to {num_layers}, the layers of the shallowest component; each block "
            "needs a layer of each."
        )
    cuts = [(2 * i * num_layers + num_blocks) // (2 * num_blocks) for i in range(num_blocks + 1)]
    return tuple(range(a, b) for a, b in zip(cuts, cuts[1:]))
