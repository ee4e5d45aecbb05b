import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixwright.backbones.hf import byte_tokenizer
from mixwright.data.batches import Batches, make_batches, pack
from mixwright.data.collate import IGNORED, Batch
from mixwright.data.order import Order
from mixwright.data.tasks import Example, TextTask, read_task

END = 1


def made(kind: Any, *examples: Example, format: Any = "prompt", labels: tuple[str, ...] = (), **options: Any) -> Batch:
    task = TextTask("t", format, examples, labels)
    settings = {"batch_size": len(examples), "seed": 0, "max_length": 16} | options
    batches = make_batches(task, byte_tokenizer(kind), kind, **settings)
    return batches.take(slice(0, len(examples)))


def decoded(row: torch.Tensor) -> str:
    return byte_tokenizer().decode([int(token) for token in row if token >= 0])


def test_only_the_completion_and_the_end_count_and_targets_are_the_next_tokens() -> None:
    batch = made("causal", Example("abc:", target="xy"), Example("a:", target="z"))
    ids, targets = batch.inputs["input_ids"], batch.targets
    assert decoded(targets[0]) == "xy</s>" and decoded(targets[1]) == "z</s>" and batch.weight == 5
    for row in range(2):
        counted = (targets[row] != IGNORED).nonzero().squeeze(-1)
        assert torch.equal(targets[row][counted], ids[row][counted + 1])
    assert batch.inputs["attention_mask"].sum(1).tolist() == [7, 4] and ids[1, 4:].eq(0).all()


def test_a_long_prompt_loses_its_beginning_and_the_completion_stays() -> None:
    batch = made("causal", Example("0123456789abcdef", target="xyz"), max_length=8)
    assert decoded(batch.inputs["input_ids"][0]) == "cdefxyz</s>" and batch.weight == 4


def test_a_long_completion_is_cut_and_always_counts() -> None:
    batch = made("causal", Example("prompt", target="0123456789"), max_length=6)
    assert batch.inputs["input_ids"].shape == (1, 6) and batch.weight == 5
    assert made("causal", Example("prompt", target="0123456789"), max_target_length=3).weight == 3


def test_a_label_is_completed_in_words() -> None:
    batch = made("causal", Example("hm", label=1), format="label", labels=("no", "yes"))
    assert decoded(batch.inputs["input_ids"][0]) == "hm\nyes</s>" and decoded(batch.targets[0]) == "yes</s>"


def test_sequence_to_sequence_pads_both_sides_apart() -> None:
    batch = made("seq2seq", Example("abc", target="x"), Example("a", target="xyz"), max_target_length=3)
    assert [decoded(row) for row in batch.targets] == ["x</s>", "xy</s>"]
    assert batch.targets[0].tolist()[-1] == IGNORED and batch.weight == 5
    assert batch.inputs["attention_mask"].sum(1).tolist() == [4, 2]


def test_an_encoder_gets_the_texts_of_all_labels() -> None:
    batch = made("encoder", Example("abc", label=2), Example("d", label=0), format="label", labels=("r", "g", "bb"))
    assert batch.targets.tolist() == [2, 0] and batch.weight == 2 and batch.label_inputs is not None
    assert batch.label_inputs["attention_mask"].sum(1).tolist() == [3, 3, 4]


@pytest.mark.parametrize(
    ("kind", "format", "message"),
    [
        ("encoder", "prompt", "a sentence encoder learns from text/label"),
        ("seq2seq", "text", "trains causal models only"),
    ],
)
def test_a_kind_that_cannot_learn_from_a_format_says_so(kind: Any, format: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(kind, Example("a", target="b"), format=format)


@given(st.lists(st.lists(st.integers(2, 9), max_size=7), min_size=1, max_size=6), st.integers(2, 9))
def test_packing_keeps_every_token_in_order(documents: list[list[int]], length: int) -> None:
    stream = [token for document in documents for token in [*document, END]]
    if len(stream) < 2:
        return
    rows = pack(documents, END, length)
    joined = [token for row in rows for token in row]
    assert stream[: len(joined)] == joined and len(stream) - len(joined) <= 1  # one last token alone predicts nothing
    assert all(len(row) == length for row in rows[:-1])


SENTENCE = "The hybrid reads, letter by letter,  what stood in the file: \u00fc\u4e16 {x}.\n"


@pytest.mark.parametrize("kind", ["txt", "jsonl", "hub"])
def test_a_decoded_batch_contains_the_original_sentence(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing is joined, split or spaced out on the way, whatever the text came in."""
    source = tmp_path / f"text.{kind}"
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict({"text": ["Before it.", SENTENCE]})
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    elif kind == "txt":
        source.write_text(f"Before it.\n{SENTENCE}After it.\n", encoding="utf-8")
    else:
        source.write_text("\n".join(json.dumps({"text": text}) for text in ("Before it.", SENTENCE)))
    task = read_task("someone/texts" if kind == "hub" else source)
    tokenizer = words(SENTENCE)
    for one in (byte_tokenizer(), tokenizer):
        rows = make_batches(task, one, "causal", batch_size=1, seed=0, max_length=1024)
        ids = [batch.inputs["input_ids"][0] for batch in (rows.take(part) for part in rows.in_order())]
        assert SENTENCE in one.decode(torch.cat(ids).tolist())
    assert len(tokenizer(SENTENCE)["input_ids"]) < 40  # and its pieces are longer than a letter


def words(text: str) -> Any:
    """A byte-level BPE tokenizer trained on `text`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text] * 8, vocab_size=320, min_frequency=1, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>")


def test_packed_text_counts_every_token_but_the_first_of_a_row() -> None:
    batch = made("causal", Example("abcdefg"), Example("hij"), format="text", max_length=6)
    assert [decoded(row) for row in batch.inputs["input_ids"]] == ["abcdef", "g</s>hij</s>"] and batch.weight == 10


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="the text has 0 tokens"):
        pack([[]], None, 8)


@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 5))
def test_each_pass_is_a_permutation_and_the_place_is_computed(size: int, seed: int, epoch: int) -> None:
    order = Order(size, seed)
    indices = [order.at(epoch * size + position) for position in range(size)]
    assert sorted(indices) == list(range(size))
    assert Order(size, seed).at(epoch * size + size - 1) == indices[-1]  # asked out of the blue


def test_batches_are_a_function_of_seed_and_number() -> None:
    def batches(seed: int) -> Batches:
        return Batches(
            list(range(10)), lambda rows: Batch("causal", {}, torch.tensor(rows), 1), batch_size=4, seed=seed
        )

    first = [batches(0).batch(i).targets.tolist() for i in range(5)]
    assert (
        first
        == [batches(0).batch(i).targets.tolist() for i in range(5)]
        != [batches(1).batch(i).targets.tolist() for i in range(5)]
    )
    assert sorted(sum(first, [])) == sorted([*range(10)] * 2)


def test_every_example_is_scored_once_by_whichever_process() -> None:
    batches = Batches(list(range(10)), lambda rows: Batch("causal", {}, torch.tensor(rows), 1), batch_size=3, seed=0)
    for world in (1, 2, 3):
        seen = [batches.take(part).targets.tolist() for rank in range(world) for part in batches.in_order(rank, world)]
        assert sorted(sum(seen, [])) == list(range(10))


def test_the_digest_changes_with_rows_lengths_and_tokenizer() -> None:
    def digest(text: str = "a", length: int = 8, kind: Any = "causal") -> str:
        task = TextTask("t", "prompt", (Example(text, target="b"),))
        return make_batches(task, byte_tokenizer(kind), "causal", batch_size=1, seed=0, max_length=length).digest

    assert digest() == digest() and len({digest(), digest("b"), digest(length=9), digest(kind="seq2seq")}) == 4
