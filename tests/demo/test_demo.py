"""The first run from end to end, with hardly any training: what it leaves, and that a second run uses it again."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mixwright as mw
from mixwright.demo import pool
from mixwright.demo.compare import MERGED, ROUTED, TUNED, verdict
from mixwright.demo.corpus import Domain
from mixwright.demo.mixed import PASSAGE, mix
from mixwright.demo.run import demonstrate
from mixwright.evaluation.scores import LOWER_IS_BETTER
from mixwright.evaluation.table import BEST_SINGLE, Scores, Table

assert "nats" in LOWER_IS_BETTER


class Words:
    """A tokenizer of one token per word."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def _domain(name: str, token: int) -> Domain:
    return Domain(name=name, what=name, train=("",), held_out=(" ".join([str(token)] * 200),))


def test_mixed_documents_hold_two_domains_and_know_whose_each_token_is() -> None:
    documents = mix([_domain("a", 0), _domain("b", 1), _domain("c", 2)], Words(), 16)
    assert documents.tokens.shape == (16, 2 * PASSAGE)
    assert (documents.domains[:, 0] != documents.domains[:, 1]).all()
    assert torch.equal(documents.tokens, documents.domains.repeat_interleave(PASSAGE, 1))
    assert torch.equal(documents.tokens, mix([_domain("a", 0), _domain("b", 1), _domain("c", 2)], Words(), 16).tokens)


def _table(routed: float) -> Table:
    noise = torch.linspace(-0.01, 0.01, 64)
    others = [BEST_SINGLE, MERGED, TUNED, "PHATGOOSE with pooled scores", "signatures with pooled scores"]
    values = {ROUTED: routed + noise.flip(0), **dict.fromkeys(others, 5.0 + noise)}
    return Table([Scores(name, "mixed documents", "nats", each) for name, each in values.items()])


def test_the_verdict_says_so_when_routing_loses() -> None:
    assert "is better than" in verdict(_table(4.5))[0]
    assert "is worse than" in verdict(_table(5.5))[0]
    assert "level" in verdict(_table(5.0))[0]


def test_the_demo_leaves_a_model_that_loads_and_is_not_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "EXPERT_STEPS", 2)
    monkeypatch.setattr(pool, "GATE_STEPS", 2)
    first = io.StringIO()
    found = demonstrate(tmp_path, Console(file=first, width=120), steps=2, experts=2)
    assert len(found.domains) == 2 and len(found.table.systems) >= 10
    for heading in ("1. Look for text", "2. Train the parts", "3. Compose", "4. Compare", "5. Look", "Try next"):
        assert heading in first.getvalue()
    assert (tmp_path / "explained.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    record = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert record["verdict"] == found.verdict and record["corpus"] == found.corpus
    model = mw.load(tmp_path / "composition")
    assert set(model.experts) == set(found.domains)
    weights = {card.id: card.files for card in mw.Catalog(tmp_path / "experts").cards()}
    second = io.StringIO()
    again = demonstrate(tmp_path, Console(file=second, width=120), steps=2, experts=2)
    assert "used again" in second.getvalue()
    assert {card.id: card.files for card in mw.Catalog(tmp_path / "experts").cards()} == weights
    assert again.table.means("nats") == found.table.means("nats")
