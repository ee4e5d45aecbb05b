"""The comparison of the pretrained pair measures what it says: parts that share nothing, whole cells, honest rivals."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mixwright.backbones.hf import bpe_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routing import Condition

pytestmark = pytest.mark.usefixtures("benchmarks_importable")


def module(name: str):
    return importlib.import_module(f"benchmarks.hybrid_pretrained_{name}")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty articles and a play of forty scenes, every sentence of its own."""
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "tinyshakespeare").mkdir()
    articles = [f" = Title {i} = \n \n" + " ".join(f"Fact {i} {j} ." for j in range(60)) + " \n" for i in range(40)]
    (tmp_path / "wikitext2" / "valid.txt").write_text(" \n" + "".join(articles[:20]))
    (tmp_path / "wikitext2" / "test.txt").write_text(" \n" + "".join(articles[20:]))
    speeches = [f"KING {i}:\nLine {i} of my play, and it is long: " + "ay, " * 120 for i in range(600)]
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("\n\n".join(speeches))
    return tmp_path


def test_every_document_lies_in_one_part_and_all_text_is_kept(data: Path) -> None:
    texts = module("texts")
    for corpus in ("general", "shakespeare", "library"):
        given = texts.documents(corpus, data)
        split = texts.parts(corpus, given)
        placed = [text for part in split.values() for text in part]
        assert len(placed) == len(given) > 20 and sorted(placed) == sorted(given)
        assert len(set(given)) == len(given) and all(split.values())
    articles = texts.documents("general", data)
    assert len(articles) == 40 and all(" = Title " in text for text in articles)
    play = (data / "tinyshakespeare" / "input.txt").read_text()
    assert "\n\n".join(texts.documents("shakespeare", data)) == play


def test_windows_hold_the_original_sentences_and_depend_on_seed_and_step_only(data: Path) -> None:
    texts = module("texts")
    tokenizer = bpe_tokenizer(texts.documents("general", data), 300)
    found = texts.Texts(data, tokenizer, ("general",)).parts["general"]
    windows = found["test"].windows(1000)
    assert len(windows) == len(found["test"].documents)
    assert "Fact 4 3 ." in tokenizer.decode(windows[0].flatten())
    assert all(torch.equal(a[1:, 0], a[:-1, -1]) for a in windows)  # one token is read twice: predicted, then given
    batches = texts.Batches(found["train"].stream, 3)
    again = texts.Batches(found["train"].stream, 3)
    assert torch.equal(batches(5), again(5)) and not torch.equal(batches(5), batches(6))
    assert not torch.equal(batches(5), texts.Batches(found["train"].stream, 4)(5))


def test_document_losses_are_those_of_each_documents_own_tokens() -> None:
    training = module("training")
    model = tiny_backbone("gpt2")
    draw = torch.Generator().manual_seed(0)
    length = module("texts").LENGTH + 1
    documents = [torch.randint(0, 256, (count, length), generator=draw) for count in (1, 3, 2)]
    with torch.no_grad():
        expected = [float(module("pair").loss_of(model, windows)) for windows in documents]
    assert training.document_losses(model, documents).tolist() == pytest.approx(expected, abs=1e-5)


def test_training_moves_what_it_is_given_and_counts_what_it_spends() -> None:
    training, texts = module("training"), module("texts")
    model = tiny_backbone("gpt2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    chosen = [p for name, p in model.named_parameters() if "mlp" in name]
    windows = texts.Batches(torch.arange(3000) % 250, 0, batch=2)
    spent = training.Spent()
    losses = training.train(model, chosen, windows, 12, 1e-2, spent)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "mlp" in name} and losses[-1] < losses[0]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    forward = 12 * training.forward_flops(model) * texts.BATCH * texts.LENGTH
    assert spent.steps == 12 and 2 * forward < spent.flops < 3 * forward


def test_an_ensemble_of_one_weight_is_that_component() -> None:
    systems = module("systems")
    pair = [tiny_backbone("gpt2"), tiny_backbone("llama")]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        alone = [one(input_ids=ids).logits for one in pair]
        mixed = systems.LogitEnsemble(pair, [0.25, 0.75])(ids).logits
        first = systems.LogitEnsemble(pair, [1.0, 0.0])(ids).logits
    torch.testing.assert_close(mixed, 0.25 * alone[0] + 0.75 * alone[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(first, alone[0], atol=1e-5, rtol=0)


def test_projectors_of_least_squares_are_fitted_before_they_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    systems, texts = module("systems"), module("texts")
    shop = object.__new__(systems.Workshop)
    shop.pair = dict(zip(systems.NAMES, (tiny_backbone("gpt_neox"), tiny_backbone("mamba2")), strict=True))
    shop.budget, shop.rates, shop.aligned = systems.Budget(align=1), {"align": 1e-9}, {}
    stream = torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0))
    part = texts.Part([stream])
    shop.texts = SimpleNamespace(parts={texts.GENERAL: {"align": part, "test": part}})
    found = {kind: shop.align(systems.Shape(projectors=kind), 0)[0] for kind in ("identity", "least_squares")}
    identity, fitted = (
        torch.cat([p.detach().flatten() for p in systems.projectors_of(model)]) for model in found.values()
    )
    assert len(identity) == len(fitted) and float((identity - fitted).abs().max()) > 1e-3
    again = shop.align(systems.Shape(projectors="least_squares"), 0)[0]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), found["least_squares"].parameters(), strict=True))


def test_every_search_moves_weights_towards_the_better_component(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supernet of two predictions, one of which is right: what all searches must agree on."""
    found = module("search")
    monkeypatch.setattr(found, "ETA", 1.0)
    for kind in found.SEARCHES:
        torch.manual_seed(0)
        model = Choice()
        path = found.search(model, [model.bias], kind, right, right, 20, 1e-3, module("training").Spent())
        assert path[1] == [[0.5, 0.5]] and path[-1][0][0] > 0.6, kind
        assert sum(path[-1][0]) == pytest.approx(1.0, abs=1e-5)


def right(step: int) -> torch.Tensor:
    del step
    return torch.ones(2, 9, dtype=torch.long)


class Choice(torch.nn.Module):
    """logits = alpha . ((0, 4), (4, 0)) + bias."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.bias = MixtureWeights(2), torch.nn.Parameter(torch.zeros(2))

    @property
    def mixture_weights(self) -> torch.Tensor:
        return self.router.weights().detach()[None]

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        del use_cache
        weights = self.router(torch.zeros(0), Condition()).weights
        logits = weights @ torch.tensor([[0.0, 4.0], [4.0, 0.0]]) + self.bias
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, 2))


def test_cells_are_kept_whole_and_a_line_that_was_cut_is_measured_again(tmp_path: Path) -> None:
    found, cache = module("cells"), tmp_path / "cells.jsonl"
    assert found.Cells(cache).take("a", lambda: {"loss": 1.0}) == {"loss": 1.0}
    with cache.open("a") as file:
        file.write('{"key": "b", "lo')
    again = found.Cells(cache)
    assert again.take("a", lambda: pytest.fail("measured twice")) == {"loss": 1.0}
    again.take("b", lambda: {"loss": 2.0})
    assert [json.loads(line)["key"] for line in cache.read_text().splitlines()] == ["a", "b"]
    with pytest.raises(SystemExit, match="time is up before c"):
        found.Cells(cache, until=0.0).take("c", dict)


def test_rivals_are_chosen_on_the_search_part_and_verdicts_on_the_test_part() -> None:
    tables = module("tables")
    lucky = {"test": [1.0, 1.1, 1.2], "search_part": 3.0}
    steady = {"test": [2.0, 2.1, 2.2], "search_part": 2.0}
    ours = {"test": [1.9, 2.0, 2.1], "search_part": 2.5}
    cells = {
        "components, equal tokens: library seed 0": {"neox": lucky, "mamba2": steady, "ensemble apart": steady},
        "hybrid K=1 identity own: library seed 0": {"hybrid": ours, "cut": ours, "cut and tuned again": ours},
    }
    said = [v for v in tables.verdicts(cells, "library") if v.system == "hybrid K=1"]
    assert [(v.rival, v.budget, v.word) for v in said] == [("the best component (mamba2)", "equal tokens", "better")]


def test_a_cut_hybrid_has_one_component_in_every_slot() -> None:
    given = {"embedding": [0.4, 0.6], "blocks": [[0.9, 0.1], [0.2, 0.8]], "head": [0.5, 0.5]}
    found = module("cells").cut(given)
    assert found == {"embedding": [0.0, 1.0], "blocks": [[1.0, 0.0], [0.0, 1.0]], "head": [1.0, 0.0]}
