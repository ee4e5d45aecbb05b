import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data.collate import IGNORED
from mixwright.data.mad import EASY, HARDEST, mad_batches
from mixwright.data.mad_tasks import Compression, FuzzyRecall, InContextRecall, Memorisation, SelectiveCopy

TASKS = [*EASY.values(), *HARDEST.values()]
seeds = st.integers(0, 2**31)


def rows(examples):
    return zip(examples.tokens.tolist(), examples.targets.tolist())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.vocab_size}")
def test_everything_follows_from_seed_and_split_and_nothing_from_the_global_state(task):
    torch.manual_seed(0), np.random.seed(0)
    first = task.sample(4, 3)
    torch.manual_seed(1), np.random.seed(1)
    again = task.sample(4, 3)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.targets, again.targets)
    others = [task.sample(4, 4), task.sample(4, 3, "validation"), task.sample(4, 3, "test")]
    assert all(not torch.equal(first.tokens, other.tokens) for other in others)
    assert first.tokens.shape == first.targets.shape == (4, task.length)
    assert int(first.tokens.min()) >= 0 and int(first.tokens.max()) < task.vocab_size
    assert (first.targets != IGNORED).any(1).all()  # every row asks for something


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.vocab_size}")
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_who_asks_for_more_gets_the_same_examples_first(task, split):
    few, many = task.sample(70, 3, split), task.sample(200, 3, split)
    assert torch.equal(few.tokens, many.tokens[:70]) and torch.equal(few.targets, many.targets[:70])
    assert len(few) == 70 and len(many.tokens.unique(dim=0)) > 100 and len(task.sample(0, 3, split)) == 0


def test_the_settings_are_those_of_the_table():
    assert list(EASY) == [
        "in-context-recall", "fuzzy-recall", "noisy-recall", "selective-copy", "memorisation", "compression"
    ]  # fmt: skip
    assert list(HARDEST) == list(EASY)[:5]
    assert [(t.vocab_size, t.length, t.num_train) for t in EASY.values()] == [
        (16, 128, 12_800), (16, 128, 12_800), (32, 128, 12_800), (16, 256, 12_800), (256, 32, 256), (16, 32, 12_800)
    ]  # fmt: skip
    assert [(t.vocab_size, t.length, t.num_train) for t in HARDEST.values()] == [
        (128, 128, 800), (128, 128, 800), (144, 128, 800), (128, 256, 800), (8192, 32, 256)
    ]  # fmt: skip
    assert HARDEST["noisy-recall"].noise == 0.8 and HARDEST["selective-copy"].copied == 96


@given(seeds, st.integers(2, 20), st.integers(4, 20), st.sampled_from([0.0, 0.3, 0.9]))
def test_recall_has_one_value_for_a_key_and_scores_exactly_what_was_shown(seed, pairs, known, noise):
    task = InContextRecall(known + 3, 2 * pairs, noise_tokens=3, noise=noise)
    for tokens, targets in rows(task.sample(3, seed)):
        value_of = {}
        for key, value, asked, after in zip(tokens[::2], tokens[1::2], targets[::2], targets[1::2]):
            assert after == IGNORED
            if key >= known:
                assert value >= known and asked == IGNORED  # noise is noise on both places and never scored
                continue
            assert key < known // 2 <= value < known
            assert asked == value_of.get(key, IGNORED)  # a first occurrence is unscored
            assert value_of.setdefault(key, value) == value
        assert targets[-2] == tokens[-1]


def test_recall_has_as_much_noise_as_it_says():
    task = HARDEST["noisy-recall"]
    share = float((task.sample(200, 0).tokens[:, ::2] >= 128).float().mean())
    assert abs(share - 0.8 * 62 / 64) < 0.01  # of 64 pairs the last and one before it are none


def fuzzy_pairs(tokens, vocab_size):
    """(key, value, place of the value) of a row, read back from the kinds of its tokens."""
    half, at = (vocab_size - 1) // 2, 0
    while tokens[at] == vocab_size - 1:
        at += 1
    while at < len(tokens):
        key_end = at
        while tokens[key_end] < half:
            key_end += 1
        end = key_end
        while end < len(tokens) and half <= tokens[end] < vocab_size - 1:
            end += 1
        yield tuple(tokens[at:key_end]), tuple(tokens[key_end:end]), key_end
        at = end


@given(seeds, st.integers(1, 3), st.integers(7, 16), st.sampled_from(["train", "test"]))
def test_fuzzy_recall_asks_for_whole_values_of_keys_that_were_shown(seed, motif, vocab_size, split):
    task = FuzzyRecall(vocab_size, 8 * motif, motif)
    for tokens, targets in rows(task.sample(3, seed, split)):
        value_of, expected = {}, [IGNORED] * len(tokens)
        for key, value, at in fuzzy_pairs(tokens, vocab_size):
            assert len(set(key)) == len(key) and len(set(value)) == len(value) <= motif
            assert 1 <= len(key) <= motif if split == "train" else len(key) == motif
            if key in value_of:
                assert value_of[key] == value
                expected[at - 1 : at - 1 + len(value)] = value
            value_of[key] = value
        assert targets == expected and targets[-2] == tokens[-1]


def test_fuzzy_recall_trains_on_keys_of_every_size():
    sizes = [len(k) for row in FuzzyRecall().sample(20, 0).tokens.tolist() for k, _, _ in fuzzy_pairs(row, 16)]
    assert set(sizes) == {1, 2, 3}


@given(seeds, st.integers(1, 6), st.integers(0, 9), st.integers(3, 12))
def test_selective_copy_keeps_the_order_and_stands_at_random_places(seed, copied, blanks, vocab_size):
    task = SelectiveCopy(vocab_size, 2 * copied + 1 + blanks, copied)
    blank, sign, body = vocab_size - 2, vocab_size - 1, copied + blanks
    for tokens, targets in rows(task.sample(3, seed)):
        assert [token for token in tokens[:body] if token != blank] == targets[-copied:]
        assert tokens[body:] == [sign] + [blank] * copied and set(targets[:-copied]) == {IGNORED}


def test_copied_tokens_may_stand_at_every_place():
    task = SelectiveCopy(16, 20, 4)
    taken = (task.sample(400, 0).tokens[:, :15] != 14).float().mean(0)
    assert (taken - 4 / 15).abs().max() < 0.08


@given(seeds, st.integers(3, 40))
def test_memorisation_has_one_map_for_all_seeds_and_splits(seed, vocab_size):
    task = Memorisation(vocab_size, 12)
    value_of, half = task.value_of().tolist(), (vocab_size - 1) // 2
    assert len(set(value_of)) == len(value_of) == half and all(half <= v < vocab_size - 1 for v in value_of)
    for split in ("train", "test"):
        for tokens, targets in rows(task.sample(3, seed, split)):
            assert targets[1::2] == [value_of[key] for key in tokens[::2]] and set(targets[::2]) == {IGNORED}
            assert set(tokens[1::2]) == {vocab_size - 1}
    if vocab_size > 20:
        assert Memorisation(vocab_size, 12, map_seed=1).value_of().tolist() != value_of


@given(seeds)
def test_compression_asks_for_all_that_is_no_noise(seed):
    task = Compression(16, 10, noise_tokens=4, noise=0.5)
    examples = task.sample(3, seed)
    for tokens, targets in rows(examples):
        assert tokens[-1] == 15 and targets[-1] == IGNORED
        assert targets[:-1] == [token if token < 11 else IGNORED for token in tokens[:-1]]
    with pytest.raises(ValueError, match="decoded from the last state"):
        examples.causal()
    with pytest.raises(ValueError, match="decoded from the last state"):
        mad_batches(task, batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InContextRecall(16, 127), "in-context-recall: length 127"),
        (lambda: InContextRecall(16, 128, noise_tokens=16), "in-context-recall: vocab_size 0; expected 4 or more"),
        (lambda: InContextRecall(16, 128, noise=0.2), "noisy-recall: length 128, noise 0.2 of 0 tokens"),
        (lambda: FuzzyRecall(16, 11), "fuzzy-recall: length 11; expected 12 or more"),
        (lambda: SelectiveCopy(16, 32, 16), "selective-copy: length 32; expected 33 or more"),
        (lambda: Memorisation(2), "memorisation: vocab_size 2; expected 3 or more"),
        (lambda: Memorisation(8, 3), "memorisation: length 3; expected an even number"),
        (lambda: Compression(noise=0.5), "compression: noise 0.5 of 0 tokens"),
        (lambda: Memorisation().sample(1, 0, "dev"), "split 'dev'; expected one of train, validation, test"),
    ],
)
def test_settings_that_hold_nothing_are_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_batches_go_through_the_training_set_and_say_what_they_read():
    task = SelectiveCopy(8, 9, 2, num_train=6)
    batches, again = (mad_batches(task, batch_size=2, seed=s) for s in (0, 0))
    drawn = torch.cat([batches.batch(i).inputs["input_ids"] for i in range(3)])
    whole = task.sample(6, 0)
    assert sorted(drawn.tolist()) == sorted(whole.tokens.tolist())
    assert torch.equal(batches.batch(7).targets, again.batch(7).targets)
    one = batches.batch(0)
    assert one.kind == "causal" and one.weight == 4 == int((one.targets != IGNORED).sum())
    digests = {mad_batches(t, batch_size=2, seed=s).digest for t in (task, SelectiveCopy(8, 9, 1)) for s in (0, 1)}
    assert len(digests) == 4
