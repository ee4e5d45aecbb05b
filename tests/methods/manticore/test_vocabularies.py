"""Components of different tokenizers: refused in words, or given one vocabulary where that is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixwright.backbones.hf import bpe_tokenizer, load_backbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.errors import IncompatibleExpert
from mixwright.methods.manticore import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel, compose
from mixwright.methods.manticore.vocabularies import new_tables

TEXT = "the cat sat on the mat and the dog sat on the cat while it rained and rained on them all day long. " * 9


def tokenizer(size: int) -> Any:
    return bpe_tokenizer([TEXT], size)


def folder(place: Path, family: str, size: int, rows: int) -> nn.Module:
    model: Any = tiny_backbone(family, vocab_size=rows)
    model.save_pretrained(place)
    tokenizer(size).save_pretrained(place)
    return load_backbone(place)


def pair(place: Path, sizes: tuple[int, int] = (280, 264), **config: Any) -> tuple[list[nn.Module], HybridModel]:
    rows = (320, sizes[1])
    families = ("gpt_neox", "mamba2")
    models = [folder(place / f, f, size, row) for f, size, row in zip(families, sizes, rows)]
    return models, compose(ManticoreConfig(num_blocks=2, **config), models)


def test_other_tokenizers_are_refused_with_what_differs(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleExpert, match="16 of 280 tokens are in the first one only") as caught:
        pair(tmp_path)
    assert caught.value.code == "TOKENIZER" and "shared_vocabulary: true" in caught.value.message


def test_the_same_tokenizer_under_padded_rows_keeps_the_tables_and_cuts_the_padding(tmp_path: Path) -> None:
    models, hybrid = pair(tmp_path, (280, 280), vocab_size=280)
    assert all(a is b for a, b in zip(hybrid.components, models))
    assert hybrid(torch.tensor([[5, 6]])).logits.shape[-1] == 280
    assert new_tables(hybrid) == ()


def test_one_vocabulary_for_all(tmp_path: Path) -> None:
    models, hybrid = pair(tmp_path, shared_vocabulary=True)
    first, second = hybrid.components
    assert first is models[0] and second is not models[1]
    assert second.get_input_embeddings().weight.shape[0] == 280  # type: ignore[operator,union-attr]
    assert models[1].get_input_embeddings().weight.shape[0] == 264  # type: ignore[operator,union-attr]
    ids = torch.tensor([tokenizer(280).encode("the cat sat on the mat")])
    with hybrid.only(hybrid.experts[1]):
        assert torch.equal(hybrid(ids).logits, second(ids).logits)
    names = new_tables(hybrid)
    assert names and all(name.startswith("backbone.components.1.") for name in names)
    assert all(dict(hybrid.named_parameters())[name].shape[0] == 280 for name in names)


def test_a_component_that_shares_it_already_is_left_alone(tmp_path: Path) -> None:
    _, hybrid = pair(tmp_path, shared_vocabulary=True)
    again = compose(ManticoreConfig(num_blocks=1, shared_vocabulary=True), list(hybrid.components))
    assert all(a is b for a, b in zip(again.components, hybrid.components))


def test_models_in_memory_are_compared_by_size_or_by_tokenizers_that_are_given() -> None:
    models = [tiny_backbone("gpt_neox", vocab_size=280), tiny_backbone("mamba2", vocab_size=264)]
    assert compose(ManticoreConfig(), models).backbone.vocab_size == 264
    given = [tokenizer(280), tokenizer(264)]
    with pytest.raises(IncompatibleExpert, match="first one only"):
        compose(ManticoreConfig(), models, tokenizers=given)
    assert compose(ManticoreConfig(shared_vocabulary=True), models, tokenizers=given).backbone.vocab_size == 280
    far = [models[0], tiny_backbone("mamba2", vocab_size=600)]
    with pytest.raises(IncompatibleExpert, match="600 rows of its embedding against 280") as caught:
        compose(ManticoreConfig(), far)
    assert "tokenizers=[...]" in caught.value.message and "vocab_size" in caught.value.message
    assert compose(ManticoreConfig(vocab_size=264), far).backbone.vocab_size == 264  # said to be shared
    with pytest.raises(IncompatibleExpert, match="600 rows"):
        compose(ManticoreConfig(vocab_size=300), far)  # more than one of them has


@pytest.mark.parametrize(("rows", "taken"), [((64, 900), False), ((300, 428), True), ((300, 429), False)])
def test_rows_that_padding_explains_are_taken(rows: tuple[int, int], taken: bool) -> None:
    models = [tiny_backbone(family, vocab_size=size) for family, size in zip(("gpt_neox", "mamba2"), rows)]
    for order in (models, models[::-1]):
        if taken:
            assert compose(ManticoreConfig(), order).backbone.vocab_size == min(rows)
        else:
            with pytest.raises(IncompatibleExpert, match="more than padding explains"):
                compose(ManticoreConfig(), order)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    from mixwright.artifact import load

    licences = {"gpt_neox": "MIT", "mamba2": "MIT"}
    _, hybrid = pair(tmp_path, shared_vocabulary=True, licences=licences)
    hybrid.save_pretrained(tmp_path / "hybrid")
    again = load(tmp_path / "hybrid")
    ids = torch.tensor([[5, 6, 279]])
    assert torch.equal(again(ids).logits, hybrid(ids).logits)
