"""A discretised hybrid alone: the same logits and tokens to the bit, and nothing in it that nobody uses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.errors import CatalogError
from mixwright.methods.manticore.model import HybridModel
from mixwright.ops.digest import tensor_digest

IDS = torch.tensor([[5, 9, 33, 7, 120, 8]])
A, B = (1.0, 0.0), (0.0, 1.0)
LICENCES = ("Apache-2.0", "CC-BY-NC-4.0")


def hybrid(families: tuple[str, str], rows: tuple[tuple[float, ...], ...], **sizes: Any) -> HybridModel:
    depth = {"gpt2": "n_layer"}
    built = [tiny_backbone(name, **{depth.get(name, "num_hidden_layers"): 4}, **sizes) for name in families]
    model = mw.compose(
        "manticore", backbones=built, num_blocks=len(rows), licences=dict(zip(families, LICENCES, strict=True))
    )
    assert isinstance(model, HybridModel)
    model.mixture_weights = rows
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def continued(model: Any, **options: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    return model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize(
    ("families", "rows", "head"),
    [
        (("gpt_neox", "mamba2"), (A, B), None),
        (("gpt_neox", "mamba2"), (B, A, A, B), None),
        (("gpt2", "llama"), (A, B), None),
        (("qwen3", "opt"), (A, B), None),
        (("opt", "qwen3"), (A, B), A),
        (("gpt2", "mamba2"), (A, A), B),
    ],
)
def test_what_is_exported_is_the_hybrid_without_what_is_unused(
    families: tuple[str, str], rows: tuple[tuple[float, ...], ...], head: tuple[float, ...] | None, tmp_path: Path
) -> None:
    model = hybrid(families, rows)
    if head is not None:
        model.head_weights = head
    wanted, before = logits(model), tensor_digest(model)
    model.export(tmp_path / "small")
    assert tensor_digest(model) == before
    loaded = mw.load(tmp_path / "small")
    assert torch.equal(logits(loaded), wanted)
    assert torch.equal(continued(loaded), continued(model))
    assert torch.equal(continued(loaded, use_cache=False), continued(model))
    assert isinstance(loaded, HybridModel)
    for parameter in loaded.backbone.components.parameters():
        parameter.requires_grad_(True)
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    unused = [name for name, p in loaded.backbone.components.named_parameters() if p.grad is None]
    alone = f"{families.index('mamba2')}.backbone.layers.0" if head == B else "nothing"
    assert not [name for name in unused if not name.startswith(alone)], "a head alone keeps one layer, that it runs"
    kept = sum(t.numel() for path in tmp_path.rglob("components/*/*.safetensors") for t in load_file(path).values())
    assert kept == sum(p.numel() for p in loaded.backbone.components.parameters())


def test_a_component_that_acts_nowhere_is_gone_with_its_licence(tmp_path: Path) -> None:
    model = hybrid(("gpt_neox", "mamba2"), (A, A))
    assert model.ledger().duties == ("attribution", "notice", "non-commercial")
    small = model.export(tmp_path / "small")
    assert small.experts == ("gpt_neox",)
    loaded = mw.load(tmp_path / "small")
    assert loaded.ledger().expression.spdx == "Apache-2.0"
    assert loaded.ledger().duties == ("attribution", "notice")
    assert torch.equal(logits(loaded), logits(model.components[0])[..., : logits(loaded).shape[-1]])
    assert "license: apache-2.0" in (tmp_path / "small" / "README.md").read_text()


def test_exporting_again_changes_nothing(tmp_path: Path) -> None:
    model = hybrid(("gpt_neox", "mamba2"), (A, B))
    model.export(tmp_path / "small")
    loaded = mw.load(tmp_path / "small")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(mw.load(tmp_path / "again")), logits(model))
    loaded.export(tmp_path / "twice")
    assert torch.equal(logits(mw.load(tmp_path / "twice")), logits(model))


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    model = hybrid(("qwen3", "mamba2"), (A, B, A))
    model.export(tmp_path / "small")
    loaded = mw.load(tmp_path / "small")
    first: Any = loaded.backbone.components[0]
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_hybrid_that_mixes_is_not_exported(tmp_path: Path) -> None:
    model = hybrid(("gpt_neox", "mamba2"), (A, (0.5, 0.5)))
    with pytest.raises(ValueError, match=r"blocks.1 mixes gpt_neox, mamba2; `discretise\(\)` the hybrid"):
        model.export(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_layers_that_were_cut_away_can_not_be_asked_for() -> None:
    small = hybrid(("gpt_neox", "mamba2"), (A, B)).pruned()
    small.mixture_weights = (B, B)
    with pytest.raises(ValueError, match="'mamba2' has no layers in block 0"):
        logits(small)


def test_a_changed_cut_is_refused(tmp_path: Path) -> None:
    hybrid(("gpt_neox", "mamba2"), (A, B)).export(tmp_path / "small")
    weights = tmp_path / "small" / "components" / "1" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CatalogError, match="^HASH"):
        mw.load(tmp_path / "small")
    text = (tmp_path / "small" / "composition.yaml").read_text()
    (tmp_path / "small" / "composition.yaml").write_text(text.replace("backbone.embeddings", "backbone.layers"))
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CatalogError):
        mw.load(tmp_path / "small")
