"""One text through layers of neurons: the numbers are those of the layers themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.neuron_text import NeuronText, explain_neurons, retrieves_neurons
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable, initial_rows
from mixwright.routers.product_key import ProductKeyRouter

TEXT = "abca bcab cabb"


class Letters:
    """A tokenizer of one token for each character."""

    is_fast = True
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        ids = [4 + ord(letter) % 200 for letter in text]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "offset_mapping": [(place, place + 1) for place in range(len(ids))],
        }

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(number) for number in ids]


@pytest.fixture(scope="module")
def model() -> ComposedModel:
    torch.manual_seed(0)
    backbone = tiny_backbone("llama", initializer_range=0.3)
    mixtures = {
        site: Mixture(
            backbone.get_submodule(site),
            ProductKeyRouter(32, (5, 8), heads=2, top_k=3, dim_key=8, query_norm="layer"),
            NeuronExperts(NeuronTable(initial_rows(40, 2, 32, 0.3))),
        )
        for site in ("model.layers.0.mlp", "model.layers.1.mlp")
    }
    return ComposedModel(backbone, mixtures, ()).eval()


@pytest.fixture(scope="module")
def explained(model: ComposedModel) -> NeuronText:
    return explain_neurons(model, Letters(), TEXT)


def test_counts_conserve_and_the_text_is_whole(explained: NeuronText) -> None:
    assert "".join(token.text for token in explained.tokens) == TEXT
    for site in explained.sites:
        assert site.slots == len(TEXT) * 2 * 3 == sum(site.first) == sum(site.second)
        assert sum(head.slots for head in site.heads) == site.slots
        assert max(head.used for head in site.heads) <= site.used <= 40
        assert 1 <= site.effective <= site.used
        assert sum(one.share for one in site.busiest) <= 1 + 1e-9


def test_neurons_and_losses_are_those_of_the_pass(model: ComposedModel, explained: NeuronText) -> None:
    ids = torch.tensor([Letters()(TEXT)["input_ids"]])
    seen: list[Tensor] = []
    hook = model.mixtures["model.layers.0.mlp"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), model.trace() as trace:
        logits = model(input_ids=ids).logits[0]
        hook.remove()
        found = model.mixtures["model.layers.0.mlp"].router.retrieve(seen[0], model.channel.condition, detail=True)  # type: ignore[union-attr,operator]
    routing = trace["model.layers.0.mlp"][0]
    assert routing.indices is not None
    for place, token in enumerate(explained.tokens):
        at = token.at[0]
        assert at is not None and {one.id for one in at.neurons} <= set(routing.indices[0, place].tolist())
        assert at.coverage == pytest.approx(float(found.coverage[0, place].mean()), rel=1e-5)
        if place:
            wanted = torch.nn.functional.cross_entropy(logits[place - 1], ids[0, place])
            assert token.loss == pytest.approx(float(wanted), rel=1e-4)
            assert token.loss_without is not None and token.loss_without != token.loss


def test_the_busiest_fire_where_they_say(explained: NeuronText) -> None:
    for place, site in enumerate(explained.sites):
        for busy in site.busiest:
            assert busy.place == divmod(busy.id, 8) and busy.count >= 1 and busy.tokens
            first = explained.tokens[busy.tokens[0]].at[place]
            assert first is not None
        shares = [busy.share for busy in site.busiest]
        assert shares == sorted(shares, reverse=True)


def test_other_models_retrieve_nothing() -> None:
    backbone = tiny_backbone("llama")
    plain = ComposedModel(backbone, {}, ())
    assert not retrieves_neurons(plain)
    with pytest.raises(ValueError, match="retrieves no neurons"):
        explain_neurons(plain, Letters(), TEXT)
