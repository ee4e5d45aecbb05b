import pytest
import torch
from torch import nn

from mixwright.training.optimizers import make_optimizers
from mixwright.training.stage import ParamGroup, Stage, select_parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_groups_select_by_glob_and_leave_the_rest() -> None:
    chosen = select_parameters(
        Net(), [ParamGroup(select=("inner.*",), lr=1.0), ParamGroup(select=("head.bias",), lr=2.0)]
    )
    assert [list(group) for group in chosen] == [["inner.weight", "inner.bias"], ["head.bias"]]


def test_a_parameter_in_two_groups_is_refused() -> None:
    groups = [ParamGroup(select=("inner.*",), lr=1.0), ParamGroup(select=("*.bias",), lr=1.0)]
    with pytest.raises(ValueError, match="inner.bias is selected by groups 0 and 1"):
        select_parameters(Net(), groups)


def test_a_parameter_that_two_globs_of_one_group_name_is_there_once() -> None:
    chosen = select_parameters(Net(), [ParamGroup(select=("inner.*", "*.weight"), lr=1.0)])
    assert list(chosen[0]) == ["embed.weight", "inner.weight", "inner.bias", "head.weight"]


def test_a_glob_that_selects_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'outer\.\*' selects none of the 5 parameters"):
        select_parameters(Net(), [ParamGroup(select=("inner.*", "outer.*"), lr=1.0)])


def test_the_first_update_has_rate_zero_and_the_warm_up_is_linear_then_constant() -> None:
    stage = Stage(name="s", groups=(), steps=100)
    assert [stage.rate(step) for step in (0, 1, 3, 6, 7, 99)] == [0.0, 1 / 6, 0.5, 1.0, 1.0, 1.0]
    assert Stage(name="s", groups=(), steps=10).rate(0) == 1.0  # int(0.06 * 10) is no warm-up at all


def test_muon_takes_hidden_matrices_and_adamw_everything_else_each_once() -> None:
    net = Net()
    stage = Stage(name="s", groups=(ParamGroup(select=("*",), lr=1.0),), steps=1, optimizer="muon")
    adamw, muon = make_optimizers(net, stage, select_parameters(net, stage.groups))
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(net.inner.weight)]
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {id(p) for p in net.parameters()} - {
        id(net.inner.weight)
    }
