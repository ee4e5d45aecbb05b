import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data.collate import IGNORED
from mixwright.data.list_ops import ANSWER, PAD, SYMBOLS, VOCAB_SIZE, ListOps, apply, written

MEANINGS = {
    "[MAX": max,
    "[MIN": min,
    "[SM": lambda given: sum(given) % 10,
    "[MED": lambda given: int(statistics.median(given)),
}


def by_stack(expression: str) -> tuple[int, int]:
    """The value of an expression, and how deep it goes, by another way than the one it was made."""
    stack: list[list] = []
    deepest, value = 0, None
    for symbol in expression.split():
        assert value is None or stack, "something stands behind the end"
        if symbol in MEANINGS:
            stack.append([symbol])
        elif symbol == "]":
            operation, *given_ = stack.pop()
            assert len(given_) >= 2
            value = MEANINGS[operation](given_)
            if stack:
                stack[-1].append(value)
                continue
        else:
            stack[-1].append(int(symbol))
        deepest = max(deepest, len(stack))
    assert not stack and value is not None
    return value, deepest


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 6))
def test_answers_are_exact_and_shapes_as_asked(seed, depth, arguments):
    task = ListOps(4, 40, max_depth=depth, max_arguments=arguments)
    batch = task.sample(4, seed)
    for ids, targets, mask in zip(batch.inputs["input_ids"], batch.targets, batch.inputs["attention_mask"]):
        length = int(mask.sum())
        assert 4 <= length - 1 <= 40 and ids[length - 1] == ANSWER and (ids[length:] == PAD).all()
        value, deepest = by_stack(written(ids))
        assert deepest <= depth
        assert targets[length - 1] == SYMBOLS[str(value)] and (targets != IGNORED).sum() == 1


def test_worked_example():
    assert by_stack("[MAX 2 9 [MIN 4 7 ] 0 ]") == (9, 2)
    assert [apply(name, [8, 1, 4, 7]) for name in MEANINGS] == [8, 1, 0, 5]
    assert apply("[MED", [9, 0, 4]) == 4


def test_expressions_follow_from_the_seed_and_every_symbol_occurs():
    task = ListOps(16, 96)
    one, again, other = (task.sample(64, seed).inputs["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one[:, :20], other[:, :20])
    assert set(one.unique().tolist()) == set(range(VOCAB_SIZE))


@pytest.mark.parametrize("settings", [(3, 10), (16, 8), (16, 513), (16, 32, 0), (16, 32, 2, 1)])
def test_settings_that_hold_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="expected 4 to 512 tokens"):
        ListOps(*settings)


def test_lengths_that_do_not_come_about_are_said_so():
    with pytest.raises(ValueError, match="no expression of 30 to 40 tokens"):
        ListOps(30, 40, max_depth=1, max_arguments=3).sample(1, 0)
