"""The probe: when a site runs, on which tokens, which sites share an input, and which sites do not run at all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.probe import called_sites, probe
from mixwright.errors import IncompatibleExpert
from mixwright.ops.digest import tensor_digest
from mixwright.sites import target_sites


def seen(family: str, *targets: str) -> Any:
    backbone = tiny_backbone(family)
    return probe(backbone, target_sites(backbone, targets or ("all-linear",)))


def test_t5_has_three_streams() -> None:
    streams = seen("t5").streams()
    assert streams["encoder.block.0.layer.0.SelfAttention.q"] == "encoder"
    assert streams["decoder.block.0.layer.0.SelfAttention.q"] == "decoder"
    assert streams["decoder.block.0.layer.1.EncDecAttention.q"] == "decoder"
    assert streams["decoder.block.0.layer.1.EncDecAttention.k"] == "cross"
    assert streams["decoder.block.0.layer.1.EncDecAttention.v"] == "cross"


@pytest.mark.parametrize(("family", "ahead"), [("bert", True), ("vit", True), ("llama", False), ("gpt2", False)])
def test_a_stream_whose_early_tokens_see_later_ones_is_shared_as_an_encoder_s(family: str, ahead: bool) -> None:
    sites = [site for site in seen(family).sites.values() if not site.stream.startswith("alone/")]
    assert {site.looks_ahead for site in sites} == {ahead}
    assert {site.shared_as for site in sites} == {"encoder" if ahead else "decoder"}


def test_cross_attention_of_all_layers_reads_one_tensor() -> None:
    backbone = tiny_backbone("t5", num_decoder_layers=2)
    groups = probe(backbone, target_sites(backbone, ("EncDecAttention.k", "EncDecAttention.v"))).groups()
    assert [len(group) for group in groups] == [4]


@pytest.mark.parametrize(
    ("family", "group"),
    [
        ("llama", ("q_proj", "k_proj", "v_proj")),
        ("bert", ("query", "key", "value")),
        ("falcon", ("query_key_value", "dense_h_to_4h")),
        ("vit", ("q_proj", "k_proj", "v_proj")),
    ],
)
def test_sites_that_read_one_tensor_share_a_group(family: str, group: tuple[str, ...]) -> None:
    assert [tuple(path.split(".")[-1] for path in g) for g in seen(family).groups()][0] == group


def test_order_is_that_of_the_pass() -> None:
    sites = seen("opt").sites
    names = [path.split(".")[-1] for path in sites][:6]
    assert sorted(names[:3]) == ["k_proj", "q_proj", "v_proj"]
    assert names[3:] == ["out_proj", "fc1", "fc2"]
    assert [s.order for s in sites.values()] == list(range(len(sites)))


def test_tokens_without_a_batch_axis_are_known() -> None:
    sites = seen("opt").sites
    assert {path.split(".")[-1] for path, s in sites.items() if s.flat} == {"fc1", "fc2"}
    assert {s.stream for s in sites.values()} == {"decoder"}


def test_a_pooler_stands_alone() -> None:
    assert seen("bert", "pooler.dense").streams() == {"pooler.dense": "alone/pooler.dense"}


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(IncompatibleExpert, match=r"^TARGET lm_head: its weight is tied"):
        seen("gpt2", "lm_head")
    assert seen("llama", "lm_head").streams() == {"lm_head": "decoder"}


def test_a_bypassed_layer_is_refused() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.used = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.attention(x, x, x)[0])

    model, x = Bypass(), torch.randn(2, 3, 8)
    assert target_sites(model, ("all-linear",)) == ("used",)
    assert probe(model, ("used",), {"x": x}).sites["used"].stream == "decoder"
    with pytest.raises(IncompatibleExpert, match=r"^TARGET attention\.out_proj: the backbone has"):
        probe(model, ("attention.out_proj",), {"x": x})


def test_a_state_space_mixers_fused_projection_is_refused() -> None:
    backbone = tiny_backbone("mamba2")
    assert {path.split(".")[-1] for path in target_sites(backbone, ("all-linear",))} == {"in_proj"}
    with pytest.raises(IncompatibleExpert, match=r"^TARGET backbone\.layers\.0\.mixer\.out_proj"):
        probe(backbone, target_sites(backbone, ("out_proj",)))


def test_all_linear_leaves_out_what_is_never_called() -> None:
    class Spare(nn.Module):
        main_input_name = "input_ids"
        config = SimpleNamespace(vocab_size=10)

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.used(self.embed(input_ids))

    assert called_sites(Spare(), ("all-linear",)) == ("used",)
    assert called_sites(Spare(), ("all-linear", "spare")) == ("used", "spare")
    with pytest.raises(IncompatibleExpert, match="^TARGET spare"):
        probe(Spare(), ("used", "spare"))


def test_an_idle_expert_of_a_sparse_layer_is_a_site() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[1](x)

    found = probe(Sparse(), ("experts.0", "experts.1", "experts.2"), {"x": torch.randn(1, 2, 4)})
    assert list(found.sites) == ["experts.1", "experts.0", "experts.2"]
    assert len(found.groups()) == 3


def test_a_foreign_model_that_can_not_be_run_shares_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    found = probe(model, ("0", "1"))
    assert not found.ran
    assert found.groups() == (("0",), ("1",))
    assert set(found.streams().values()) == {"decoder"}


def test_a_change_in_place_separates_two_sites() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            y = self.first(x)
            x.add_(1)
            return y + self.second(x)

    assert len(probe(InPlace(), ("first", "second"), {"x": torch.randn(1, 2, 4)}).groups()) == 2


def test_probing_leaves_no_mark() -> None:
    backbone = tiny_backbone("t5").train()
    backbone.encoder.eval()
    before, modes = tensor_digest(backbone), [m.training for m in backbone.modules()]
    state = torch.random.get_rng_state()
    probe(backbone, target_sites(backbone, ("all-linear",)))
    assert tensor_digest(backbone) == before
    assert [m.training for m in backbone.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in backbone.modules())


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "t5", "gpt2", "falcon"])
def test_all_linear_is_the_blocks(family: str) -> None:
    chosen = target_sites(tiny_backbone(family), ("all-linear",))
    assert chosen
    assert all(any(part.isdigit() for part in path.split(".")) for path in chosen)
    assert not [path for path in chosen if "head" in path or "pooler" in path]
