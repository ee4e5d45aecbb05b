"""Tokenizers compared by what they do, and one vocabulary for models that read different ones."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

from mixwright.backbones.hf import bpe_tokenizer, byte_tokenizer, load_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.backbones.tokenizers import differences, fingerprint, rows_of, same_tokenizer
from mixwright.backbones.vocabulary import vocabulary_of, with_vocabulary
from mixwright.errors import CatalogError, IncompatibleExpert

STORY = "the cat sat on the mat and the dog sat on the cat while it rained and rained on them all day long. " * 20
CODE = "def cat(mat):\n    return [the for the in mat if the.sat]\n\nclass Dog(Cat):\n    rained = all(day)\n" * 20


@pytest.fixture(scope="module")
def story() -> Any:
    return bpe_tokenizer([STORY], 300)


@pytest.fixture(scope="module")
def code() -> Any:
    return bpe_tokenizer([STORY, CODE], 310)


def test_the_same_tokenizer_learnt_twice_is_the_same(story: Any) -> None:
    again = bpe_tokenizer([STORY], 300)
    again.name_or_path = "another/name"
    assert same_tokenizer(story, again) and fingerprint(story) == fingerprint(again)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Any) -> None:
    model: Any = tiny_backbone("gpt_neox")
    model.save_pretrained(tmp_path)
    with pytest.raises(CatalogError, match="there is no tokenizer here"):
        load_tokenizer(tmp_path)


def test_the_padding_token_does_not_count(story: Any) -> None:
    other = copy.deepcopy(story)
    other.pad_token = "!"
    assert same_tokenizer(story, other) and fingerprint(story) == fingerprint(other)


def test_what_differs_is_told_in_words(story: Any, code: Any) -> None:
    found = " | ".join(differences(story, code))
    assert "tokens have other ids, first: " in found and "are in the second one only, first: " in found
    assert not same_tokenizer(story, code) and fingerprint(story) != fingerprint(code)


def test_other_splitting_and_special_tokens_are_seen_though_the_vocabulary_is_one(story: Any) -> None:
    from tokenizers import normalizers, pre_tokenizers

    splits, folds, ends = (copy.deepcopy(story) for _ in range(3))
    splits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folds.backend_tokenizer.normalizer = normalizers.Lowercase()
    ends.eos_token = "!"
    assert differences(story, splits) == ("splitting differs: ByteLevel against Whitespace",)
    assert differences(story, folds) == ("normalisation differs: none against Lowercase",)
    assert differences(story, ends) == ("eos_token is '<|end|>' against '!'",)
    assert len({fingerprint(each) for each in (story, splits, folds, ends)}) == 4


def test_merges_in_another_order_are_seen(story: Any) -> None:
    import json

    from tokenizers import Tokenizer

    other = copy.deepcopy(story)
    state = json.loads(story.backend_tokenizer.to_str())
    merges = state["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    other._tokenizer = Tokenizer.from_str(json.dumps(state))
    (said,) = differences(story, other)
    assert said.startswith("merges differ from rule 4 on: ")


def test_each_new_token_stands_on_rows_that_spell_it(story: Any, code: Any) -> None:
    rows = rows_of(story, code)
    assert len(rows) == len(code)
    for token, group in enumerate(rows):
        if token == code.eos_token_id:
            assert group == [story.eos_token_id]
            continue
        piece = code.convert_ids_to_tokens(token)
        assert "".join(story.convert_ids_to_tokens(group)) == piece
        if piece in story.get_vocab():
            assert group == [story.get_vocab()[piece]]
    assert max(map(len, rows)) > 1


def test_a_vocabulary_of_its_own_stays_as_it_is(story: Any) -> None:
    assert rows_of(story, story) == [[i] for i in range(len(story))]


WORDS = ["cat", "mat", "dog", "rain", "bridge", "window", "lantern", "harbour"]


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@torch.no_grad()
def per_letter(model: nn.Module, tokenizer: Any) -> float:
    """Nats per letter of words in an order that nobody has seen."""
    ids = torch.tensor([tokenizer.encode(text(40, 1))])
    return float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) / len(text(40, 1))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_goes_on_reading_in_another_vocabulary(tied: bool) -> None:
    few, many = bpe_tokenizer([text(400, 0)], 276), bpe_tokenizer([text(400, 0)], 292)
    model = tiny_backbone("gpt_neox", vocab_size=276, tie_word_embeddings=tied).train()
    ids = torch.tensor(few.encode(text(400, 0))[:512]).view(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own, before = per_letter(model.eval(), few), {name: value.clone() for name, value in model.state_dict().items()}
    new: Any = with_vocabulary(model, few, many)
    zero_shot = per_letter(new, many)
    tables = (new.get_output_embeddings().weight, new.get_input_embeddings().weight)  # type: ignore[operator,union-attr]
    assert (tables[0] is tables[1]) == tied
    with torch.no_grad():  # the same with rows drawn as for a new model
        for table in {id(table): table for table in tables}.values():
            table.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    drawn = per_letter(new, many)
    assert own < 0.7 and zero_shot < 0.8 * drawn, (own, zero_shot, drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    config: Any = model.config
    assert config.vocab_size == 276


def test_the_copy_says_what_it_reads_and_can_be_saved(story: Any, code: Any, tmp_path: Any) -> None:
    from mixwright.backbones.hf import load_backbone

    model: Any = tiny_backbone("gpt2", vocab_size=300)
    new: Any = with_vocabulary(model, story, code)
    assert new.config.vocab_size == len(code) and new.config.eos_token_id == code.eos_token_id
    assert vocabulary_of(new) == fingerprint(code) and vocabulary_of(model) is None
    assert new.transformer.h[0].mlp.c_fc.weight is model.transformer.h[0].mlp.c_fc.weight
    new.save_pretrained(tmp_path)
    again = load_backbone(tmp_path, kind="causal")
    ids = torch.tensor([code.encode("the cat sat")])
    assert torch.equal(again(ids).logits, new(ids).logits)
    assert vocabulary_of(again) == fingerprint(code)


def test_tokens_that_nothing_spells_get_the_mean_of_all_rows(story: Any) -> None:
    from mixwright.backbones.vocabulary import means

    table = torch.arange(6.0).reshape(3, 2)
    assert means(table, [[0], [0, 2], []]).tolist() == [[0.0, 1.0], [2.0, 3.0], [2.0, 3.0]]
    assert rows_of(byte_tokenizer(), story)[4:8] == [[byte_tokenizer().get_vocab()[p]] for p in "$%&'"]


def test_a_model_with_more_tables_of_tokens_is_refused(story: Any, code: Any) -> None:
    from mixwright.backbones.family import tiny_of

    with pytest.raises(IncompatibleExpert, match="depends on the vocabulary too"):
        with_vocabulary(tiny_of("gemma4_text"), story, code)
