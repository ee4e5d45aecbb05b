import json

import pytest
import torch

from mixwright.evaluation.intervals import paired_difference
from mixwright.evaluation.verdict import EQUAL_FLOPS, best_of, verdict


def losses(*, gap: float = 0.0, noise: float = 0.05, documents: int = 40, seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    theirs = 3 + torch.randn(documents, generator=draw)
    return theirs + gap + noise * torch.randn(documents, generator=draw), theirs


@pytest.mark.parametrize("gap, word", [(-0.1, "better"), (0.1, "worse"), (0.0, "no significant difference")])
def test_all_three_verdicts_can_be_given(gap: float, word: str):
    found = verdict(*losses(gap=gap), rival="the Mamba", budget=EQUAL_FLOPS)
    assert found.word == word
    assert word in found.sentence() and "the Mamba at equal FLOPs" in found.sentence()
    assert json.loads(json.dumps(found.as_json()))["verdict"] == word


def test_without_weights_the_interval_is_that_of_the_paired_difference():
    ours, theirs = losses(gap=0.02)
    found, plain = verdict(ours, theirs, rival="r").difference, paired_difference(ours, theirs)
    assert (found.value, found.low, found.high, found.n) == pytest.approx(
        (plain.value, plain.low, plain.high, plain.n), abs=1e-9
    )


def test_a_difference_that_is_none_is_called_one_in_about_one_of_twenty():
    said = [verdict(*losses(seed=seed), rival="r", resamples=500).word for seed in range(200)]
    wrong = sum(word != "no significant difference" for word in said)
    assert 2 <= wrong <= 24


def test_runs_that_disagree_are_no_difference_however_narrow_the_interval():
    ours, theirs = losses(gap=-0.2, noise=0.001)
    three = torch.stack([ours, ours, theirs + 0.01])
    found = verdict(three, theirs.expand(3, -1), rival="r")
    assert found.difference.high < 0 < found.seeds[2]
    assert found.word == "no significant difference"
    assert verdict(three[:2], theirs.expand(2, -1), rival="r").word == "better"


def test_more_runs_of_the_same_documents_do_not_narrow_the_interval():
    ours, theirs = losses(gap=0.02)
    one = verdict(ours, theirs, rival="r").difference
    many = verdict(ours.expand(9, -1), theirs.expand(9, -1), rival="r").difference
    assert many.high - many.low == pytest.approx(one.high - one.low)


def test_weights_make_it_the_mean_over_tokens():
    ours, theirs = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    tokens = torch.tensor([900.0, 100.0])
    assert verdict(ours, theirs, rival="r").difference.value == pytest.approx(0.0)
    assert verdict(ours, theirs, rival="r", tokens=tokens).difference.value == pytest.approx(-0.8)


@pytest.mark.parametrize(
    "ours, tokens, message",
    [
        (torch.zeros(3), None, "same documents"),
        (torch.tensor([1.0, float("nan")]), None, "not finite"),
        (torch.zeros(2), torch.zeros(2), "all above 0"),
        (torch.zeros(2), torch.ones(3), "each of 2 documents"),
    ],
)
def test_what_can_not_be_compared_is_refused(ours: torch.Tensor, tokens: torch.Tensor | None, message: str):
    with pytest.raises(ValueError, match=message):
        verdict(ours, torch.zeros(2), rival="r", tokens=tokens)


def test_the_best_has_the_least_loss():
    assert best_of({"a": 2.0, "b": 1.5}) == "b"
    with pytest.raises(ValueError, match="at least one"):
        best_of({})
