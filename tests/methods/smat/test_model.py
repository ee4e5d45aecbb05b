"""The pool around a backbone: what it computes, and that it can be taken back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.digest import tensor_digest
from mixwright.routing import Condition, Routing, SupportSet

from .pools import fresh_pool, moved


def _support(ways: int = 3, shots: int = 2, seed: int = 0) -> SupportSet:
    draw = torch.Generator().manual_seed(seed)
    return SupportSet(torch.randn(ways * shots, 3, 16, 16, generator=draw), torch.arange(ways).repeat(shots))


def _queries() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))


def test_a_fresh_pool_acts_as_its_backbone() -> None:
    model, x = fresh_pool(), _queries()
    plain = tiny_backbone("vit")(x).last_hidden_state
    assert torch.equal(model(x, condition=Condition(support=_support())).last_hidden_state, plain)
    assert torch.equal(model(x).last_hidden_state, plain)


def test_adapting_in_place_equals_a_pass_under_the_support_and_is_taken_back_to_the_bit() -> None:
    model, x, support = moved(fresh_pool()), _queries(), _support()
    before = tensor_digest(model.backbone)
    functional = model(x, condition=Condition(support=support)).last_hidden_state
    with pytest.raises(RuntimeError, match="inside"), model.adapted(support):
        assert torch.equal(model(x).last_hidden_state, functional)
        with model.adapted(_support(seed=5), strength=0.5):
            assert not torch.equal(model(x).last_hidden_state, functional)
        assert torch.equal(model(x).last_hidden_state, functional)
        raise RuntimeError("inside")
    assert tensor_digest(model.backbone) == before


def test_strength_zero_is_the_pretrained_model_to_the_bit() -> None:
    model = moved(fresh_pool())
    before = tensor_digest(model.backbone)
    with model.adapted(_support(), strength=0.0):
        assert tensor_digest(model.backbone) == before


def test_the_mixture_does_not_depend_on_the_order_of_examples_or_classes() -> None:
    model, support = moved(fresh_pool()).eval(), _support(ways=4)
    weights = model.routing(support).weights
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    shuffled = SupportSet(support.inputs[order], support.labels[order])
    relabelled = SupportSet(support.inputs, torch.tensor([2, 0, 3, 1])[support.labels])
    twice = SupportSet(torch.cat([support.inputs, support.inputs]), torch.cat([support.labels, support.labels]))
    for other in (shuffled, relabelled, twice):
        torch.testing.assert_close(model.routing(other).weights, weights, rtol=1e-5, atol=1e-6)
    assert weights.sum().item() == pytest.approx(1.0)


def test_experts_can_be_forbidden_and_forced() -> None:
    model = moved(fresh_pool()).eval()
    model.set_active(["expert-0", "expert-2"])
    assert model.routing(_support()).weights[1] == 0
    model.set_active(None)
    with model.only("expert-1"):
        assert model.routing(_support()).dense().tolist() == [0.0, 1.0, 0.0]


def test_a_callable_gives_the_features() -> None:
    def firsts(model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs).last_hidden_state[:, 1]

    model = moved(fresh_pool(features=firsts))
    assert model.composition.config["features"] == "custom"
    assert model.features(_queries()).shape == (4, 32)


def test_saving_and_loading_gives_the_same_weights(tmp_path: Path) -> None:
    model, support = moved(fresh_pool()).eval(), _support()
    model.save_pretrained(tmp_path / "pool")
    again = mw.load(tmp_path / "pool", backbone=tiny_backbone("vit"))
    assert isinstance(again, FewShotModel)
    found, expected = (m.weights_for(m.routing(support)) for m in (again, model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_backbone_keeps_its_statistics_and_modes() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(8, 8, 3))
    backbone.train()
    model = mw.compose("smat", backbone=backbone, experts=2, features="mean", feature_width=8)
    before = tensor_digest(backbone)
    model.train()
    x = torch.randn(4, 3, 16, 16)
    model(x, condition=Condition(support=_support())).sum().backward()
    assert torch.equal(model(x), model(x)) and tensor_digest(backbone) == before
    assert model.router.training and not backbone[1].training
    assert model.remove().training and all(module.training for module in backbone.modules())


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_checkpointed_layers_run_again_under_the_weights_of_their_own_pass(family: str) -> None:
    ids = torch.randint(4, 200, (6, 7), generator=torch.Generator().manual_seed(0))
    items = _support().inputs if family == "vit" else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for checkpointed in (False, True):
        model = moved(fresh_pool(family)).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        runs = _runs(model)
        weights = model.weights_for(Routing(torch.full((3,), 1 / 3), 3))
        loss = model.features(items, weights).square().sum()
        loss.backward()
        found.append((len(runs), [p.grad.clone() for p in model.deltas.parameters() if p.grad is not None]))
    (plain, expected), (again, gradients) = found
    assert again > plain  # the layers did run twice
    assert len(expected) == len(gradients) > 10
    assert all(torch.equal(one, other) for one, other in zip(expected, gradients))


def _runs(model: FewShotModel) -> list[int]:
    """One entry for each run of the first linear map of the first layer."""
    runs: list[int] = []
    first = next(m for name, m in model.backbone.named_modules() if "layer" in name and isinstance(m, nn.Linear))
    first.register_forward_hook(lambda *_: runs.append(1))
    return runs
