"""What replaces a layer starts as loud as that layer was."""

import pytest
import torch

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs

KINDS = (("llama", {}), ("bert", {}), ("t5", {"shared_table": True, "sites": "all"}), ("gpt2", {"row_dim": 8}))


@pytest.mark.parametrize(("family", "more"), KINDS)
def test_outputs_have_the_size_of_those_of_the_layer_replaced(family: str, more: dict) -> None:
    backbone = tiny_backbone(family)
    inputs = example_inputs(backbone)
    assert inputs is not None

    def size(path: str) -> float:
        seen: list[float] = []
        hook = backbone.get_submodule(path).register_forward_hook(
            lambda _, args, out: seen.append(float(out.square().mean().sqrt()))
        )
        with torch.no_grad():
            backbone.eval()(**inputs)
        hook.remove()
        return seen[0]

    fresh = mw.compose("peer", tiny_backbone(family), num_experts=64, heads=2, top_k=4, dim_key=16, **more)
    path = next(iter(fresh.mixtures))
    wanted = size(path)
    composed = mw.compose("peer", backbone, num_experts=64, heads=2, top_k=4, dim_key=16, **more)
    assert size(path) == pytest.approx(wanted, rel=1e-4) and wanted > 0
    presets = composed.remove()
    other = mw.compose("peer", presets, num_experts=64, preset="peer_pytorch", dim_key=16, sites=path)
    rows = other.mixtures[path].experts.table.rows  # type: ignore[union-attr]
    assert rows.std().item() == pytest.approx(1.0, abs=0.1)  # a preset with first values of its own keeps them
