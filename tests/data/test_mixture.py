"""Many tasks in one sequence of batches: shares, passes, task ids, labels of one's own, and places computed afresh."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import Batches, make_batches
from mixwright.data.collate import IGNORED, Kind
from mixwright.data.mixture import mix_batches, numbered
from mixwright.data.order import MixedOrder, apportion
from mixwright.data.tasks import Example, TextTask
from mixwright.training.objectives import label_matching

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=5)


def task(name: str, size: int = 3, *, labels: tuple[str, ...] = (), text: bool = False) -> TextTask:
    if labels:
        rows = [Example(f"{name}{n}", label=n % len(labels), where=f"{name}:{n}") for n in range(size)]
        return TextTask(name, "label", tuple(rows), labels)
    if text:
        return TextTask(name, "text", tuple(Example(f"{name} says {n}") for n in range(size)))
    return TextTask(name, "prompt", tuple(Example(f"{name}{n}:", target=name * (1 + n % 3)) for n in range(size)))


def mixed(*tasks: TextTask, kind: Kind = "causal", **options: Any) -> Batches:
    return mix_batches(tasks, byte_tokenizer(kind), kind, **({"batch_size": 4, "seed": 0, "max_length": 32} | options))


def owners(order: MixedOrder, sizes: list[int], count: int) -> list[int]:
    bounds = torch.tensor(sizes).cumsum(0)
    return [int(torch.searchsorted(bounds, order.at(p), right=True)) for p in range(count)]


@given(SIZES, st.integers(0, 2**31))
def test_at_temperature_one_a_block_is_whole_passes_of_every_task(sizes: list[int], seed: int) -> None:
    order = MixedOrder(sizes, seed)
    block = sum(order.counts)
    seen = Counter(order.at(position) for position in range(block))
    assert block >= 1024 and set(seen.values()) == {block // sum(sizes)} and len(seen) == sum(sizes)


@given(SIZES, st.integers(0, 2**31), st.floats(0.5, 1e6), st.integers(1, 60), st.integers(0, 2))
@settings(max_examples=25)
def test_the_place_is_computed_and_each_task_comes_in_passes(
    sizes: list[int], seed: int, temperature: float, cap: int, block: int
) -> None:
    order = MixedOrder(sizes, seed, temperature=temperature, cap=cap)
    start = block * sum(order.counts)
    drawn = [order.at(position) for position in range(start + sum(order.counts))]
    asked_out_of_the_blue = MixedOrder(sizes, seed, temperature=temperature, cap=cap)
    assert asked_out_of_the_blue.at(start + 1000) == drawn[start + 1000]
    first = 0
    for size in sizes:
        own = [index for index in drawn if first <= index < first + size]
        for begin in range(0, len(own) - size + 1, size):  # every pass is a permutation, whatever block it falls into
            assert sorted(own[begin : begin + size]) == list(range(first, first + size))
        first += size
    assert len(Counter(owners(order, sizes, len(drawn)))) == len(sizes)


def shares(sizes: list[int], **options: Any) -> list[float]:
    counts = MixedOrder(sizes, 0, **options).counts
    return [count / sum(counts) for count in counts]


def test_shares_are_by_size_capped_and_tempered() -> None:
    assert shares([600, 300, 100]) == [0.6, 0.3, 0.1]
    assert shares([600, 300, 100], cap=200) == [0.4, 0.4, 0.2]
    assert shares([900, 100], temperature=2.0) == pytest.approx([0.75, 0.25], abs=1e-3)
    assert shares([3, 1, 1], temperature=1e9) == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert shares([10**6, 1], temperature=0.1)[1] > 0  # however little a task has, it is there
    drawn = owners(MixedOrder([900, 100], 0, temperature=2.0), [900, 100], 4000)
    assert drawn.count(1) / 4000 == pytest.approx(0.25, abs=1e-3)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8), st.integers(8, 500))
def test_places_are_given_out_whole_and_to_the_nearest(weights: list[float], length: int) -> None:
    counts = apportion(weights, length)
    quotas = [weight / sum(weights) * length for weight in weights]
    assert sum(counts) == length and min(counts) >= 1
    if min(quotas) >= 1:
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))


def test_different_seeds_differ_and_nothing_is_asked_of_the_global_state() -> None:
    torch.manual_seed(1)
    one = [MixedOrder([5, 9], 3).at(position) for position in range(50)]
    torch.manual_seed(2)
    assert one == [MixedOrder([5, 9], 3).at(position) for position in range(50)]
    assert one != [MixedOrder([5, 9], 4).at(position) for position in range(50)]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_mixed_batch_is_its_rows_as_their_own_tasks_make_them(kind: Kind) -> None:
    tasks = [task("a"), task("b", labels=("no", "oh yes")), task("c", 5)]
    batches = mixed(*tasks, kind=kind, batch_size=11)
    batch = batches.collate(batches.examples)
    assert batch.task_ids is not None and batch.task_ids.tolist() == [0] * 3 + [1] * 3 + [2] * 5
    row = 0
    for own in tasks:
        alone = make_batches(own, byte_tokenizer(kind), kind, batch_size=1, seed=0, max_length=32)
        for number in range(len(own)):
            one, width = alone.take(slice(number, number + 1)), int(batch.inputs["attention_mask"][row].sum())
            assert torch.equal(batch.inputs["input_ids"][row, :width], one.inputs["input_ids"][0])
            kept = batch.targets[row] != IGNORED
            assert torch.equal(batch.targets[row][kept], one.targets[0][one.targets[0] != IGNORED])
            row += 1


def test_plain_text_stands_beside_prompts() -> None:
    batches = mixed(task("a"), task("t", text=True), max_length=8)
    batch = batches.collate([batches.examples[0], batches.examples[3], batches.examples[1]])
    assert batch.task_ids is not None and batch.task_ids.tolist() == [0, 1, 0]
    assert (batch.targets != IGNORED).sum(1).tolist() == [2, 7, 3]  # completion and end; all but the first; the same


def test_an_encoders_batch_has_the_label_texts_of_its_tasks_and_no_others() -> None:
    batches = mixed(task("a", labels=("x", "yy")), task("b", labels=("z", "w", "vvvv")), kind="encoder")
    batch = batches.collate([batches.examples[4], batches.examples[1], batches.examples[0]])  # b1, a1, a0
    assert batch.task_ids is not None and batch.label_task_ids is not None and batch.label_inputs is not None
    assert batch.task_ids.tolist() == [1, 0, 0] and batch.label_task_ids.tolist() == [0, 0, 1, 1, 1]
    assert batch.targets.tolist() == [3, 1, 0]
    assert batch.label_inputs["attention_mask"].sum(1).tolist() == [3, 4, 3, 3, 6]
    alone = batches.collate([batches.examples[5]])
    assert (
        alone.targets.tolist() == [2] and alone.label_task_ids is not None and alone.label_task_ids.tolist() == [1] * 3
    )


def test_the_loss_of_mixed_texts_is_that_of_each_task_alone() -> None:
    tasks = [task("a", 2, labels=("x", "yy")), task("b", 3, labels=("z", "w", "vvvv"))]
    batches, model = mixed(*tasks, kind="encoder"), tiny_backbone("bert")

    class Deaf(torch.nn.Module):  # a model that takes task ids, and has no use for them
        under = staticmethod(lambda condition: torch.no_grad())

        def forward(self, **inputs: Any) -> Any:
            return model(**inputs)

    each = [make_batches(t, byte_tokenizer("encoder"), "encoder", batch_size=4, seed=0, max_length=32) for t in tasks]
    alone = torch.stack([label_matching(model, own.collate(own.examples)) for own in each]).sum()
    together = label_matching(Deaf(), batches.collate(batches.examples))
    assert torch.isfinite(together) and together.item() == pytest.approx(alone.item(), abs=1e-4)


def test_ids_are_those_that_the_model_knows_the_tasks_by() -> None:
    batches = mixed(task("a", labels=("x", "y")), task("b", labels=("z", "w")), kind="encoder")
    renumbered = numbered(batches, ("b", "c", "a"))
    batch = renumbered.batch(3)
    assert batch.where == batches.batch(3).where and batch.task_ids is not None
    assert [{"a": 2, "b": 0}[where[0]] for where in batch.where] == batch.task_ids.tolist()
    assert batch.label_task_ids is not None and set(batch.label_task_ids.tolist()) == {0, 2}
    with pytest.raises(ValueError, match="task 'b' is unknown to the model; it knows a, c"):
        numbered(batches, ("a", "c"))


def test_held_out_batches_never_hold_two_tasks_and_say_whose_they_are() -> None:
    batches = mixed(task("a", 5), task("b", 2), batch_size=3)
    for world in (1, 2, 3):
        parts = [part for rank in range(world) for part in batches.in_order(rank, world)]
        taken = [batches.take(part) for part in parts]
        assert sum(len(batch.targets) for batch in taken) == 7
        for part, batch in zip(parts, taken, strict=True):
            assert batch.task_ids is not None
            assert {"ab"[task] for task in batch.task_ids.tolist()} == {batches.task_of(part)}


def test_the_digest_changes_with_names_rows_and_shares() -> None:
    digests = [
        mixed(task("a"), task("b")).digest,
        mixed(task("a"), task("c")).digest,
        mixed(task("b"), task("a")).digest,
        mixed(task("a", 4), task("b")).digest,
        mixed(task("a"), task("b"), temperature=2.0).digest,
        mixed(task("a"), task("b"), cap=2).digest,
    ]
    assert len(set(digests)) == 6 and digests[0] == mixed(task("a"), task("b")).digest


@pytest.mark.parametrize(
    ("kind", "tasks", "message"),
    [
        ("causal", [task("a"), task("a")], "two tasks are called 'a'"),
        ("causal", [task("a"), task("b", 0)], "task 'b' has no examples"),
        ("encoder", [task("a")], "'a': a sentence encoder learns from text/label rows, not prompt"),
        ("seq2seq", [task("a", text=True)], "'a': plain text trains causal models only"),
        ("causal", [], "0 tasks"),
    ],
)
def test_faults_name_the_task(kind: Kind, tasks: list[TextTask], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed(*tasks, kind=kind)
