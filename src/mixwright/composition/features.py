"""One vector for each item out of any model: the only thing that a few-shot classifier must know of its backbone."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.inputs import example_inputs
from mixwright.ops.mean_pool import mean_pool

Kind = Literal["auto", "cls", "pooled", "mean", "custom"]
Features = Kind | Callable[[nn.Module, Any], Tensor]


class FeatureExtractor(nn.Module):
    """f(inputs) (items, width): the model inside, and how its output becomes one vector for each item.

    `kind`: `cls`, the first token; `pooled`, what the model itself calls its pooled output; `mean`, the mean over real
    tokens or over space; `auto`, by what the model gives: `mean` for text with an attention mask, `pooled` where there
    is no pooler to be trained, and else the first token. Or a function of the model and the inputs, of which a saved
    model knows no more than that there was one (`custom`). A timm model gives what goes into its head.
    """

    def __init__(self, backbone: nn.Module, kind: Features = "auto") -> None:
        super().__init__()
        self.backbone = backbone
        self.kind = kind

    def forward(self, inputs: Any) -> Float[Tensor, "items width"]:
        """Features of a batch: a tensor, or a mapping of keyword arguments."""
        if callable(self.kind):
            return self.kind(self.backbone, inputs)
        if self.kind == "custom":
            raise ValueError(
                "features='custom': this model was composed with a function for its features, which no file can hold; "
                "set model.feature_kind to that function."
            )
        if hasattr(self.backbone, "forward_features") and hasattr(self.backbone, "forward_head"):  # timm
            model: Any = self.backbone
            return model.forward_head(model.forward_features(inputs), pre_logits=True)
        output = self.backbone(**inputs) if isinstance(inputs, Mapping) else self.backbone(inputs)
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return _vectors(output, self.kind, mask, _learns_pooler(self.backbone))


def width_of(backbone: nn.Module, kind: Features) -> int:
    """The width of its features, from one small pass. Raises ValueError where the model can't be tried out."""
    inputs = example_inputs(backbone)
    if inputs is not None:
        tried = inputs if "input_ids" in inputs else next(iter(inputs.values()))
        with eval_mode(backbone):
            return FeatureExtractor(backbone, kind)(tried).shape[-1]
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise ValueError(
            f"feature_width: missing; {type(backbone).__name__} has no config that says what its inputs look like. "
            "Give the width of its features."
        )
    return width


def _vectors(output: Any, kind: str, mask: Tensor | None, learns_pooler: bool) -> Tensor:
    tokens = output if isinstance(output, Tensor) else output[0]
    pooled = None if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if kind == "auto":
        kind = "mean" if mask is not None else "pooled" if pooled is not None and not learns_pooler else "cls"
    if kind == "pooled":
        if pooled is None:
            raise ValueError("features='pooled': this model has no pooled output; take cls or mean.")
        return pooled.flatten(1)
    if tokens.dim() == 2:
        return tokens
    if tokens.dim() == 4:
        return tokens.mean((-2, -1))
    if tokens.dim() != 3:
        raise ValueError(
            f"features={kind!r}: the model gives {tuple(tokens.shape)}; expected (items, tokens, width), (items, "
            "width, height, breadth) or (items, width). Give a function of the model and the inputs."
        )
    if kind == "cls":
        return tokens[:, 0]
    return tokens.mean(1) if mask is None else mean_pool(tokens, mask)


def _learns_pooler(backbone: nn.Module) -> bool:
    """Whether its pooled output goes through a matrix, which in a pretrained model is often random."""
    pooler = getattr(backbone, "pooler", None)
    return isinstance(pooler, nn.Module) and any(parameter.dim() > 1 for parameter in pooler.parameters())
