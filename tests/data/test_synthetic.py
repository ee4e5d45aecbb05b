import pytest
import torch

from mixwright.data.collate import IGNORED
from mixwright.data.synthetic import ANSWER, END, Language, copying, exclusive, mixing, overlapping, suites

LANGUAGE = Language()


def alphabet(symbols):
    return (symbols - LANGUAGE.first_symbol) // LANGUAGE.symbols


@pytest.mark.parametrize("suite", suites(LANGUAGE), ids=lambda suite: suite.name)
def test_suites_are_determined_by_their_seed(suite):
    for task in (*suite.experts, *suite.tests):
        first, again, other = (task.sample(LANGUAGE, 8, seed) for seed in (3, 3, 4))
        assert torch.equal(first.source, again.source) and torch.equal(first.target, again.target)
        assert not torch.equal(first.source, other.source)
    assert len(suite.experts) >= 8


def test_ciphers_move_every_symbol_within_its_alphabet_and_nothing_else():
    cipher = LANGUAGE.cipher()
    symbols = torch.arange(LANGUAGE.first_symbol, LANGUAGE.vocab_size)
    assert (cipher[symbols] != symbols).all()
    assert torch.equal(alphabet(cipher[symbols]), alphabet(symbols))
    assert torch.equal(cipher.sort().values, torch.arange(LANGUAGE.vocab_size))
    assert torch.equal(cipher[: LANGUAGE.first_symbol], torch.arange(LANGUAGE.first_symbol))
    assert not torch.equal(cipher, Language(seed=1).cipher())


def test_targets_are_the_enciphered_body_and_the_end():
    for suite in suites(LANGUAGE):
        for task in (*suite.experts, *suite.tests):
            examples = task.sample(LANGUAGE, 16, 0)
            body = examples.source[:, 2:]
            assert torch.equal(examples.target[:, :-1], LANGUAGE.cipher()[body])
            assert (examples.target[:, -1] == END).all()
    copies = copying(LANGUAGE).sample(LANGUAGE, 16, 0)
    assert torch.equal(copies.target[:, :-1], copies.source[:, 2:])


def test_exclusive_inputs_are_of_one_alphabet_and_mixed_ones_of_as_many_as_they_say():
    for at, task in enumerate(exclusive(LANGUAGE).tests):
        assert (alphabet(task.sample(LANGUAGE, 16, 0).source[:, 2:]) == at).all()
    for task in mixing(LANGUAGE).tests:
        used = alphabet(task.sample(LANGUAGE, 16, 0).source[:, 2:])
        assert all(len(row.unique()) == task.mix for row in used)
        turns = (used[:, 1:] != used[:, :-1]).sum(-1)
        assert (turns == (LANGUAGE.length - 1 if task.interleaved else task.mix - 1)).all()


def test_overlapping_tests_need_two_neighbours_under_a_template_no_expert_saw():
    suite = overlapping(LANGUAGE)
    seen = {task.template for task in suite.experts}
    for task in suite.tests:
        able = [expert for expert in suite.experts if set(task.alphabets) <= set(expert.alphabets)]
        assert len(able) == 2 and task.template not in seen
    with pytest.raises(ValueError, match="templates"):
        overlapping(Language(templates=8))


def test_batches_hold_the_target_once():
    examples = exclusive(LANGUAGE).experts[0].sample(LANGUAGE, 4, 0)
    causal, paired = examples.causal(), examples.seq2seq()
    for batch in (causal, paired):
        kept = batch.targets[batch.targets != IGNORED].reshape(4, -1)
        assert torch.equal(kept, examples.target)
    ids = causal.inputs["input_ids"]
    assert (ids[:, examples.source.shape[1]] == ANSWER).all()
    at = causal.targets[:, :-1] != IGNORED
    assert torch.equal(causal.targets[:, :-1][at], ids[:, 1:][at])
