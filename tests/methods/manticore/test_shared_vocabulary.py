"""Two components of different tokenizers through every stage that trains: the new tables learn in align, and stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright import api
from mixwright.backbones.hf import bpe_tokenizer, load_backbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.errors import IncompatibleExpert
from mixwright.methods.manticore.rewinding import rewound
from mixwright.methods.manticore.vocabularies import new_tables

from .pair import findings, recipe_in, record, train

WORDS = "train validation test the red fox and the old tree and the cold sea and the new moon and the grey owl. " * 9
SIZES = {"gpt_neox": 300, "qwen3": 272}
PAST = torch.tensor([[5, 280, 290, 299]])  # tokens that the second one's own vocabulary has not


def folders(place: Path) -> list[str]:
    for family, size in SIZES.items():
        model: Any = tiny_backbone(family, vocab_size=size)
        model.save_pretrained(place / family)
        bpe_tokenizer([WORDS], size).save_pretrained(place / family)
    return [str(place / family) for family in SIZES]


def recipe(place: Path, **config: Any) -> Any:
    known: dict[str, Any] = {"names": list(SIZES), "licences": dict.fromkeys(SIZES, "MIT"), "num_blocks": 2}
    found = recipe_in(place, shared_vocabulary=True, discretise_steps=1, **known, **config)
    return {**found, "backbones": folders(place)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shared")
    train(recipe(place))
    return place


def left(place: Path, stage: str) -> Any:
    return api.load(place / "run" / stage / "composition")


def tables(component: Any) -> tuple[Tensor, Tensor]:
    return component.get_input_embeddings().weight, component.get_output_embeddings().weight


def test_new_tables_learn_in_align_and_nothing_else_of_a_component(whole: Path) -> None:
    start, end = (findings(whole, "align")[f"components_at_{when}"] for when in ("start", "end"))
    assert start["gpt_neox"] == end["gpt_neox"] and start["qwen3"] != end["qwen3"]
    assert start["qwen3"] != findings(whole, "align")["pretrained"]["qwen3"]
    aligned, pristine = left(whole, "align"), load_backbone(whole / "qwen3")
    embedding, head = tables(aligned.components[1])
    assert embedding is head and embedding.shape[0] == 300  # it came with a tied head
    assert new_tables(aligned) == ("backbone.components.1.model.embed_tokens.weight",)
    before = pristine.state_dict()
    for name, tensor in aligned.components[1].state_dict().items():
        assert torch.equal(tensor, before[name]) == (tensor.shape[0] != 300), name


def test_rewinding_keeps_what_they_learned(whole: Path) -> None:
    aligned, searched = left(whole, "align"), left(whole, "search")
    pristine = [load_backbone(whole / family) for family in SIZES]
    fresh = rewound(searched, pristine)
    ours, kept, moved = (tables(model.components[1]) for model in (fresh, aligned, searched))
    assert torch.equal(ours[0], kept[0]) and not torch.equal(moved[0], kept[0])
    assert ours[0] is ours[1]
    digests = findings(whole, "tune")["components_at_start"]
    assert digests == findings(whole, "align")["components_at_end"]
    assert tables(pristine[1])[0].shape[0] == 272


@pytest.mark.parametrize("stage", ["align", "search", "tune", "discretise"])
def test_it_is_loaded_with_equal_logits_and_tied(whole: Path, stage: str, tmp_path: Path) -> None:
    model = left(whole, stage)
    logits = model(PAST).logits
    assert logits.shape[-1] == 300 and torch.isfinite(logits).all()
    model.save_pretrained(tmp_path / "again")
    again: Any = api.load(tmp_path / "again")
    assert torch.equal(again(PAST).logits, logits)
    embedding, head = tables(again.components[1])
    assert embedding is head and embedding.shape[0] == 300
    assert again.generate(PAST, max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_inspect_says_who_came_with_another_tokenizer(whole: Path) -> None:
    gate = next(gate for gate in record(whole, "inspect")["gates"] if gate["name"] == "tokenizers")
    assert gate["passed"] and gate["said"].startswith("qwen3 came with another tokenizer")


def test_evaluate_compares_with_components_that_read_the_same_tokens(whole: Path) -> None:
    found = findings(whole, "evaluate")
    assert found["tables"].keys() == {"qwen3"} and "as stage align left them" in found["tables"]["qwen3"]
    rows = {row["system"]: row["loss"] for row in found["systems"]}
    aligned, job_losses = findings(whole, "align")["reference"], rows["qwen3 (no tuning)"]
    assert job_losses["validation"] == pytest.approx(aligned["alone"]["qwen3"], rel=0.05)
    assert rows["qwen3 (equal tokens)"] != rows["qwen3 (no tuning)"]


def test_without_it_nothing_is_trained(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    made["config"]["shared_vocabulary"] = False
    with pytest.raises(IncompatibleExpert, match="its tokenizer is not that of 'gpt_neox'.*set shared_vocabulary"):
        train(made)
    assert not (tmp_path / "run" / "align").exists()


def test_what_must_stand_still_did(whole: Path) -> None:
    for stage in ("align", "tune"):
        assert record(whole, stage)["frozen"]["parameters"] > 0, stage


def test_tables_of_heads_of_their_own_both_learn(tmp_path: Path) -> None:
    place = tmp_path / "untied"
    (place).mkdir()
    made = recipe(place, align_steps=1)
    untied: Any = tiny_backbone("mamba2", vocab_size=272, seed=3)
    untied.save_pretrained(place / "qwen3")
    train(made, stage="align")
    component: nn.Module = left(place, "align").components[1]
    embedding, head = tables(component)
    assert embedding is not head and embedding.shape[0] == head.shape[0] == 300
    assert len(new_tables(left(place, "align"))) == 2
