"""A routing that does not vary folds into plain weights; one that varies is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.composition.model import ComposedModel
from mixwright.ops.digest import tensor_digest
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.task import TaskRouter
from mixwright.routing import Condition, Routing


def output(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **more)[0]


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama", "bert", "vit", "opt"])
def test_folded_equals_unfolded(family: str, pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone(family)
    model: ComposedModel = composed(backbone, pool_of(backbone))
    inputs = example_inputs(backbone) or {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with model.replaced(dict.fromkeys(model.mixtures, ConstantRouter(torch.tensor([0.1, 0.2, 0.3, 0.4])))):
        folded = model.fold()
        torch.testing.assert_close(output(folded, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)
    assert type(folded) is type(backbone)
    assert list(tensor_digest(folded)) == list(tensor_digest(tiny_backbone(family)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_one_task_folds(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("gpt2")
    model: ComposedModel = composed(backbone, pool_of(backbone))
    inputs = example_inputs(backbone) or {}
    table = torch.softmax(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), -1)
    with model.replaced(dict.fromkeys(model.mixtures, TaskRouter(table))):
        folded = model.fold(Condition(task_ids=torch.tensor([1])))
        wanted = output(model, inputs, condition=Condition(task_ids=torch.tensor([1, 1])))
        torch.testing.assert_close(output(folded, inputs), wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"decides anew for each token or row \(\(2, 1\) choices\)"):
            model.fold(Condition(task_ids=torch.tensor([0, 1])))


def test_a_single_expert_folds(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("gpt2")
    model: ComposedModel = composed(backbone, pool_of(backbone))
    inputs = example_inputs(backbone) or {}
    with model.only("c"):
        torch.testing.assert_close(output(model.fold(), inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


def test_token_routing_does_not_fold(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("gpt2")
    model: ComposedModel = composed(backbone, pool_of(backbone))
    with pytest.raises(ValueError, match=r"the router at transformer\.h\.0\.attn\.c_attn decides anew for each token"):
        model.fold()


def test_no_weight_at_all_folds_to_the_backbone(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("llama")
    before = tensor_digest(backbone)
    model: ComposedModel = composed(backbone, pool_of(backbone))
    with model.routed_by(Routing(torch.zeros(4), 4)):
        assert tensor_digest(model.fold()) == before
