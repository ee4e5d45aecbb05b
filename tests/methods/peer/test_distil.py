"""What a layer misses of the one that it replaced, against the same computed by hand, at whole layers and at halves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.collate import Batch
from mixwright.methods.peer.composed import PeerComposedModel
from mixwright.methods.peer.config import PeerConfig
from mixwright.methods.peer.distil import match_replaced
from mixwright.methods.peer.model import compose
from mixwright.routing import Condition

ENDS = {"llama": ("mlp", "mlp"), "opt": ("fc1", "fc2"), "gpt_neox": ("mlp", "mlp")}


def composed(family: str, **settings: Any) -> PeerComposedModel:
    config = PeerConfig(num_experts=64, heads=2, top_k=4, dim_key=8, sites="all", query_norm="layer", **settings)
    return compose(config, [tiny_backbone(family)])


def batch_of() -> Batch:
    ids = torch.randint(4, 260, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return Batch(kind="causal", inputs={"input_ids": ids, "attention_mask": mask}, targets=ids, weight=18)


@torch.no_grad()
def by_hand(model: PeerComposedModel, family: str, batch: Batch) -> Tensor:
    """Inputs and outputs of the layers of the bare backbone, taken down by hooks of our own."""
    taken: dict[str, Tensor] = {}
    bare = tiny_backbone(family)
    first, second = ENDS[family]
    for path, module in bare.named_modules():
        if path.endswith(first):
            module.register_forward_pre_hook(lambda _, args, p=path: taken.__setitem__(f"{p}.in", args[0]))
        if path.endswith(second):
            module.register_forward_hook(lambda _, args, out, p=path: taken.__setitem__(f"{p}.out", out))
    bare(**batch.inputs)
    real, total = batch.inputs["attention_mask"].bool(), torch.zeros(())
    for site, (router, experts) in model.layers.items():
        x, wanted = taken[f"{site.removesuffix(second)}{first}.in"], taken[f"{site}.out"]
        x, wanted = (t.reshape(3, 6, -1) for t in (x, wanted))
        said = experts(x, router(x, Condition(token_mask=real)), Condition())
        total += (said - wanted)[real].square().sum() / wanted[real].square().sum()
    return total * batch.weight


@pytest.mark.parametrize("family", ENDS)
def test_the_loss_is_what_is_missed(family: str) -> None:
    model, batch = composed(family), batch_of()
    found = match_replaced(model, batch)
    torch.testing.assert_close(found, by_hand(model, family, batch))
    found.backward()
    assert all(experts.table.rows.grad.any() for _, experts in model.layers.values())
    with torch.no_grad():
        for _, experts in model.layers.values():
            experts.table.rows[:, -1].zero_()
    torch.testing.assert_close(match_replaced(model, batch), torch.tensor(2.0 * batch.weight))  # it says nothing
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert len(hooks) == len(model._hooks)
    assert model.channel.enabled


def test_what_stands_beside_a_layer_is_refused() -> None:
    model = composed("llama", mode="parallel")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp keeps its layer \(mode='parallel'\)"):
        match_replaced(model, batch_of())


def test_a_trainer_finds_what_it_looks_for() -> None:
    """transformers' Trainer passes the columns that the signature names, and reads the loss."""
    import inspect

    model, batch = composed("llama"), batch_of()
    assert {"input_ids", "attention_mask", "labels"} <= set(inspect.signature(model.forward).parameters)
    loss = model(**batch.inputs, labels=batch.targets).loss
    loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {name for name, p in model.named_parameters() if p.requires_grad}
