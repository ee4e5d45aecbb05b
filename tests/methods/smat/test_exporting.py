"""One adaptation, out of the pool: equal to the model under it, for those who have no mixwright."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixwright.backbones.tiny import tiny_backbone
from mixwright.errors import CatalogError
from mixwright.methods.smat.exporting import ExportedPool
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.digest import tensor_digest
from mixwright.ops.hard_concrete import LIMIT
from mixwright.routing import Routing, SupportSet

from .pools import fresh_pool, moved


def _model(backbone: nn.Module | str = "vit", **config: Any) -> FewShotModel:
    return moved(fresh_pool(backbone, **config), spread=2.0, middle=-3.0)


def _support(dtype: torch.dtype = torch.float32) -> SupportSet:
    draw = torch.Generator().manual_seed(0)
    return SupportSet(torch.randn(6, 3, 16, 16, generator=draw).to(dtype), torch.arange(3).repeat(2))


def _queries(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9)).to(dtype)


def _outputs(model: FewShotModel, strength: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad(), model.adapted(_support(dtype), strength):
        return model(_queries(dtype)).last_hidden_state


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_state_dict_is_the_model_under_the_support(strength: float) -> None:
    model = _model()
    before = tensor_digest(model.backbone)
    state = model.export(_support(), strength=strength)
    assert isinstance(state, dict) and tensor_digest(model.backbone) == before
    other = tiny_backbone("vit", seed=3).eval()
    other.load_state_dict(state)
    assert torch.equal(other(_queries()).last_hidden_state, _outputs(model, strength))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_opens_without_this_library(dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = _model(tiny_backbone("vit").to(dtype))
    done = model.export(_support(dtype), tmp_path / "out")
    assert isinstance(done, ExportedPool)
    again = transformers.ViTModel.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    with torch.no_grad():
        assert torch.equal(again(_queries(dtype)).last_hidden_state, _outputs(model, dtype=dtype))
    record = json.loads((tmp_path / "out" / "made_from.json").read_text())
    assert record["base_sha256"] == {
        name: digest for name, digest in tensor_digest(model.backbone).items() if name in record["base_sha256"]
    }
    assert len(record["base_sha256"]) == len(list(model.backbone.named_parameters()))
    assert sum(record["weights_of_experts"].values()) == pytest.approx(1.0) and len(record["pool_sha256"]) == 64
    assert done.numbers == sum(record["changed"].values()) > 0
    assert "without a gradient step" in (tmp_path / "out" / "README.md").read_text()


def test_half_precision_is_merged_in_float32_and_then_cast() -> None:
    """A change of 0.4 of the step of bfloat16 at 1.0, twice as strong: rounded once, it takes the step."""
    step = 2.0**-7
    base = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    nn.init.ones_(base.get_parameter("0.weight"))
    model = _model(base, experts=2, feature_width=4)
    with torch.no_grad():
        model.deltas.delta["0/weight"].fill_(0.6 * step)
        model.deltas.logits["0/weight"].copy_(torch.tensor([3.0, -3.0])[:, None, None].expand(2, 4, 4))
    for share, expected in ((0.8, 1.0), (0.9, 1.0 + step)):
        state = model.export(Routing(torch.tensor([share, 1 - share]), 2))
        assert isinstance(state, dict)
        assert state["0.weight"].dtype == torch.bfloat16 and bool((state["0.weight"] == expected).all())


def test_a_plain_torch_model_is_one_file(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.LayerNorm(8))
    model = _model(base, feature_width=8)
    model.export(_support(), tmp_path / "out")
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.LayerNorm(8))
    other.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    with model.adapted(_support()), torch.no_grad():
        assert torch.equal(other(_queries()), model(_queries()))


def test_prototypes_are_those_under_the_new_weights(tmp_path: Path) -> None:
    model, support = _model(), _support()
    model.export(support, tmp_path / "out")
    found = load_file(tmp_path / "out" / "prototypes.safetensors")["prototypes"]
    with model.adapted(support), torch.no_grad():
        features = model.features(support.inputs)
    expected = torch.stack([features[support.labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(found, expected)


def test_a_remembered_adaptation_is_exported_as_it_was_kept(tmp_path: Path) -> None:
    model = _model()
    model.remember("cats", (_support().inputs, ["a", "b", "c"] * 2), 0.5)
    model.export("cats", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "made_from.json").read_text())
    assert record["strength"] == 0.5 and record["classes"] == ["a", "b", "c"]
    found = load_file(tmp_path / "out" / "prototypes.safetensors")["prototypes"]
    assert torch.equal(found, model.remembered("cats").prototypes)


def test_tied_weights_are_written_under_both_names() -> None:
    backbone = tiny_backbone("gpt2")
    model = _model(backbone, feature_width=32, include=("transformer.wte.weight",))
    state = model.export(Routing(torch.tensor([1.0, 0.0, 0.0]), 3))
    assert isinstance(state, dict)
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    assert not torch.equal(state["lm_head.weight"], backbone.get_parameter("lm_head.weight"))


@pytest.mark.parametrize(
    ("include", "whole"),
    [
        (("layers.*.weight",), ("layernorm_after", "layernorm_before")),
        (("*fc1.weight", "*q_proj.weight"), ()),
        (("*",), ("embeddings", "layernorm", "k_proj")),
    ],
)
def test_peft_reads_the_sparse_adapter(include: tuple[str, ...], whole: tuple[str, ...], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = _model(include=include)
    if include == ("*",):  # biases of linear layers would make these whole
        model = _model(
            exclude=(
                "*.q_proj.bias",
                "*.fc*.bias",
            )
        )
    done = model.export(_support(), tmp_path / "adapter", sparse=True, strength=0.7)
    assert isinstance(done, ExportedPool)
    ends = {path.rpartition(".")[2] for path in done.whole}
    assert ends.issuperset(whole) and bool(ends) == bool(whole)
    base = tiny_backbone("vit").eval()
    wrapped = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        found = wrapped(_queries()).last_hidden_state
    torch.testing.assert_close(found, _outputs(model, 0.7), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, tiny_backbone("vit").eval()(_queries()).last_hidden_state, atol=1e-2)


def test_what_peft_has_no_form_for_is_refused(tmp_path: Path) -> None:
    dense = _model(include=("*.fc1.weight", "*q_proj.weight"))
    with torch.no_grad():
        for logits in dense.deltas.logits.values():
            logits.fill_(LIMIT)
    with pytest.raises(ValueError, match=r"q_proj\.weight: SHiRA gives every layer .* Take a state dict"):
        dense.export(_support(), tmp_path / "adapter", sparse=True)
    with pytest.raises(ValueError, match="no linear layer's weight changes alone"):
        _model(include=("layernorm.*",)).export(_support(), tmp_path / "adapter", sparse=True)
    tied = _model(tiny_backbone("gpt2"), feature_width=32, include=("transformer.wte.weight",))
    with pytest.raises(ValueError, match=r"wte\.weight and lm_head\.weight are one tensor"):
        tied.export(Routing(torch.tensor([1.0, 0.0, 0.0]), 3), tmp_path / "adapter", sparse=True)
    with pytest.raises(ValueError, match="give the folder"):
        _model().export(_support(), sparse=True)
    assert not (tmp_path / "adapter").exists()


def test_a_folder_in_use_is_refused_and_the_weights_are_as_they_were(tmp_path: Path) -> None:
    model = _model()
    before = tensor_digest(model.backbone)
    (tmp_path / "thesis.txt").write_text("x")
    for sparse in (False, True):
        with pytest.raises(CatalogError, match="^PATH "):
            _model(
                exclude=(
                    "*.q_proj.bias",
                    "*.fc*.bias",
                )
            ).export(_support(), tmp_path, sparse=sparse)
    with pytest.raises(CatalogError, match="^PATH "):
        model.export(_support(), tmp_path)
    assert tensor_digest(model.backbone) == before
