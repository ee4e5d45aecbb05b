"""One linear layer under PEFT's own routers, with the same tensors as ours."""

from typing import Any

import torch
from torch import Tensor, nn


class OneLayer(nn.Module):
    """The least model that PEFT takes: one linear layer at `site`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.site = base

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def with_adapters(base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> Any:
    """A PEFT model with one LoRA adapter `task_<e>` for each expert."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=down.shape[1], lora_alpha=scale * down.shape[1], target_modules=["site"])
    model: Any = get_peft_model(OneLayer(base), config, adapter_name="task_0")  # type: ignore[arg-type]
    for expert in range(1, down.shape[0]):
        model.add_adapter(f"task_{expert}", config)
    layer = model.base_model.model.site
    with torch.no_grad():
        for expert in range(down.shape[0]):
            layer.lora_A[f"task_{expert}"].weight.copy_(down[expert])
            layer.lora_B[f"task_{expert}"].weight.copy_(up[expert])
    return model.eval()


def arrow(model: Any, num_experts: int, top_k: int) -> nn.Module:
    """PEFT's Arrow over all adapters of `model`, as `create_arrow_model` builds it from folders."""
    from peft import ArrowConfig, LoraConfig

    config = ArrowConfig(top_k=top_k, rng_seed=0)
    config.task_adapter_names = [f"task_{expert}" for expert in range(num_experts)]
    config.gks_adapter_names = []
    rank = model.peft_config["task_0"].r
    model.add_adapter("arrow_router", LoraConfig(arrow_config=config, target_modules=["site"], r=rank))
    model.set_adapter("arrow_router")
    return model.eval()


def x_lora(model: Any, num_experts: int, top_k: int, scalings: Tensor) -> Any:
    """PEFT's X-LoRA layer over all adapters; the scalings (tokens, experts), which its classifier makes once for the
    whole model, are given and cost nothing here. Returns a function of x (1, tokens, d_in)."""
    from peft.tuners.xlora.config import XLoraConfig
    from peft.tuners.xlora.layer import XLoraLinearLayer

    model.base_model.set_adapter([f"task_{expert}" for expert in range(num_experts)])
    owner = nn.Module()
    owner.disabled = False  # type: ignore[assignment]
    config = XLoraConfig(hidden_size=1, adapters={"task_0": "unused"}, top_k_lora=top_k, enable_softmax=False)
    target = model.base_model.model.site
    layer = XLoraLinearLayer(owner, target, target.forward, 0, config)
    return lambda x: layer.forward(x, scalings=scalings[None, :, None, :])


def poly(base: nn.Linear, skills: int, tasks: int, rank: int) -> Any:
    """PEFT's own Poly layer around `base`; takes x (batch, tokens, d_in) and `task_ids` (batch,)."""
    from peft import PolyConfig
    from peft.tuners.poly.layer import Linear

    config = PolyConfig(r=rank, n_tasks=tasks, n_skills=skills, n_splits=1, init_weights=False)
    layer = Linear(base, "poly", config)
    base.requires_grad_(False)
    return layer
