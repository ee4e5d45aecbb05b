"""Every number of an explanation, computed again by brute force from the raw factors and from models composed anew."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.explain import Explanation, explain
from mixwright.experts.lora import LoraExperts
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter
from mixwright.sites import Site, linear_sites

TEXT = "Two  words,\n\tone naïve 🙂 line.\n"
EXPERTS = ("law", "yaml", "code")


def pool(site: Site, place: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Seeded factors of all three experts at a site, of ranks 1 to 3."""
    made = torch.Generator().manual_seed(place)
    return [
        (torch.randn(rank, site.d_in, generator=made) * 0.3, torch.randn(site.d_out, rank, generator=made) * 0.3, 0.5)
        for rank in (1, 2, 3)
    ]


def composed(
    family: str, experts: Sequence[str] = EXPERTS, top_k: int = 2, null_expert: float | None = None
) -> ComposedModel:
    backbone = tiny_backbone(family)
    mixtures: dict[str, Mixture] = {}
    chosen = [EXPERTS.index(expert) for expert in experts if expert in EXPERTS]
    sites = {path: site for path, site in linear_sites(backbone).items() if path.rsplit(".", 1)[-1] != "lm_head"}
    for place, (path, site) in enumerate(sites.items()):
        factors = pool(site, place)
        gates = torch.randn(len(EXPERTS), site.d_in, generator=torch.Generator().manual_seed(1000 + place))
        nobody = [None] * (len(experts) - len(chosen))
        router = TokenRouter(PrototypeScores(gates[chosen]), min(top_k, len(chosen)), null_expert=null_expert)
        members = LoraExperts.stack([*(factors[i] for i in chosen), *nobody])
        mixtures[path] = Mixture(backbone.get_submodule(path), router, members)
    return ComposedModel(backbone, mixtures, experts)


@pytest.fixture(scope="module")
def llama() -> Explanation:
    return explain(composed("llama"), byte_tokenizer(), TEXT, without="yaml")


def test_tokens_rejoin_to_the_exact_text(llama: Explanation) -> None:
    assert "".join(token.text for token in llama.tokens) + llama.tails["text"] == TEXT
    assert all(token.stream == "text" for token in llama.tokens)


def test_contributions_are_those_of_the_raw_factors() -> None:
    model, tokenizer = composed("gpt2"), byte_tokenizer()
    found = explain(model, tokenizer, TEXT)
    inputs: dict[str, torch.Tensor] = {}

    def keep(mixture: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[mixture.site] = args[0][0]  # type: ignore[index]

    handles = [mixture.register_forward_pre_hook(keep) for mixture in model.mixtures.values()]
    with torch.no_grad(), model.trace() as trace:
        model(input_ids=torch.tensor([tokenizer(TEXT)["input_ids"]]))
    for handle in handles:
        handle.remove()

    sites = linear_sites(tiny_backbone("gpt2"))
    by_token = torch.zeros(len(found.tokens), len(EXPERTS))
    weight_of_token = torch.zeros(len(found.tokens), len(EXPERTS))
    by_depth = {depth: [torch.zeros(len(EXPERTS)), 0] for depth in found.depths}
    for place, path in enumerate(path for path in sites if path != "lm_head"):
        weight = model.mixtures[path].base.weight  # type: ignore[union-attr]
        frozen = inputs[path] @ weight  # Conv1D keeps (d_in, d_out); its bias is left out
        applied = trace[path][0].dense()[0]
        for expert, (down, up, scale) in enumerate(pool(sites[path], place)):
            added = applied[:, expert, None] * scale * (inputs[path] @ down.T @ up.T)
            ratio = added.norm(dim=-1) / frozen.norm(dim=-1)
            by_token[:, expert] += ratio / len(model.mixtures)
            weight_of_token[:, expert] += applied[:, expert] / len(model.mixtures)
            depth = next(depth for depth in found.depths if path.startswith(depth + "."))
            by_depth[depth][0][expert] += ratio.sum()  # type: ignore[index]
            by_depth[depth][1] += len(ratio) / len(EXPERTS)
    for position, token in enumerate(found.tokens):
        for acting in token.experts:
            expert = EXPERTS.index(acting.expert)
            assert acting.contribution == pytest.approx(float(by_token[position, expert]), rel=1e-4)
            assert acting.weight == pytest.approx(float(weight_of_token[position, expert]), rel=1e-4)
        assert token.leader == EXPERTS[int(by_token[position].argmax())]
        assert sum(acting.share for acting in token.experts) == pytest.approx(1.0, rel=1e-5)
    for row, (total, count) in zip(found.contribution_by_depth, by_depth.values(), strict=True):
        assert row == pytest.approx((total / count).tolist(), rel=1e-4)
    for row in found.weight_by_depth:
        assert sum(row) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_loss_without_an_expert_is_that_of_a_pool_without_it(top_k: int) -> None:
    tokenizer = byte_tokenizer()
    whole = explain(composed("llama", top_k=top_k), tokenizer, TEXT, without="yaml")
    rest = explain(composed("llama", ("law", "code"), top_k=top_k), tokenizer, TEXT)
    assert [t.loss_without for t in whole.tokens[1:]] == pytest.approx([t.loss for t in rest.tokens[1:]], abs=1e-5)


def test_losses_are_the_models_and_the_backbones(llama: Explanation) -> None:
    ids = torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        backbone = tiny_backbone("llama")(input_ids=ids, labels=ids).loss
        model = composed("llama")(input_ids=ids, labels=ids).loss
    assert llama.tokens[0].loss is None and llama.tokens[0].loss_backbone is None
    assert llama.mean_loss() == pytest.approx(float(model), abs=1e-5)
    assert llama.mean_loss("loss_backbone") == pytest.approx(float(backbone), abs=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = composed("llama")
    state = {name: tensor.clone() for name, tensor in model.added_state().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    explain(model, byte_tokenizer(), TEXT)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.added_state().items())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert model.channel.trace is None and modes == [module.training for module in model.modules()]


def test_is_deterministic(llama: Explanation) -> None:
    assert explain(composed("llama"), byte_tokenizer(), TEXT, without="yaml") == llama


def test_leaves_out_the_expert_that_leads_most() -> None:
    found = explain(composed("llama"), byte_tokenizer(), TEXT)
    assert found.without == max(EXPERTS, key=found.led)


@pytest.mark.parametrize("answer", ["short", "an answer that is as long as it is", TEXT])
def test_encoder_decoders_explain_source_and_target(answer: str) -> None:
    tokenizer = byte_tokenizer("seq2seq")
    found = explain(composed("t5"), tokenizer, TEXT, target=answer)
    for stream, text in (("source", TEXT), ("target", answer)):
        tokens = [token for token in found.tokens if token.stream == stream]
        assert "".join(token.text for token in tokens) + found.tails[stream] == text
        assert tokens[-1].special and tokens[-1].token == "</s>"
        assert all((token.loss is not None) == (stream == "target") for token in tokens)
        assert all(sum(acting.weight for acting in token.experts) == pytest.approx(1.0, abs=1e-4) for token in tokens)
    assert found.without is not None and found.mean_loss("loss_without") is not None


def test_an_encoder_decoder_without_target_explains_the_source_only() -> None:
    found = explain(composed("t5"), byte_tokenizer("seq2seq"), TEXT)
    assert {token.stream for token in found.tokens} == {"source"} and found.mean_loss() is None


def test_encoders_have_no_loss() -> None:
    found = explain(composed("bert"), byte_tokenizer("encoder"), TEXT)
    assert found.mean_loss() is None and found.without is None
    assert found.tokens[0].special and found.tokens[-1].special


def test_refuses_what_it_cannot_explain() -> None:
    model, tokenizer = composed("llama"), byte_tokenizer()
    with pytest.raises(ValueError, match="no tokens"):
        explain(model, tokenizer, "")
    with pytest.raises(ValueError, match="no decoder"):
        explain(model, tokenizer, TEXT, target="x")
    with pytest.raises(ValueError, match="no expert 'none'"):
        explain(model, tokenizer, TEXT, without="none")
    with pytest.raises(ValueError, match="600 tokens, but the backbone takes 512"):
        explain(model, tokenizer, "a" * 600)


def test_a_router_that_does_not_choose_leaves_nobody_out() -> None:
    model, uniform = composed("llama"), ConstantRouter(torch.full((3,), 1 / 3))
    with model.replaced(routers=dict.fromkeys(model.mixtures, uniform)):
        found = explain(model, byte_tokenizer(), TEXT)
        assert found.without is None and found.mean_loss("loss_backbone") is not None
        with pytest.raises(ValueError, match="can't leave one out"):
            explain(model, byte_tokenizer(), TEXT, without="law")


def test_a_null_expert_leads_where_it_holds_most_of_the_weight() -> None:
    model = composed("llama", (*EXPERTS, "backbone"), top_k=2, null_expert=100.0)
    found = explain(model, byte_tokenizer(), TEXT)
    assert found.led("backbone") == len(found.tokens)
    assert all(token.experts[-1].contribution == 0.0 for token in found.tokens)
    assert found.without is None and found.mean_loss("loss_backbone") == pytest.approx(found.mean_loss(), abs=1e-6)
    with pytest.raises(ValueError, match="can't be left out"):
        explain(model, byte_tokenizer(), TEXT, without="backbone")
