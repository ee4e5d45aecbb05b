"""Hybrids whose mixture weights are drawn, or depend on the input: caches, beams, padding, and what they are for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import mixwright as mw
from mixwright.methods.manticore.model import HybridModel

VOCAB = 24


def llama(seed: int, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def neox(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def hybrid(components: list[nn.Module] | None = None, steep: float = 1.0, **settings: Any) -> HybridModel:
    made: Any = mw.compose(
        "manticore", backbones=components or [neox(0), llama(1)], num_blocks=2, projectors="identity", **settings
    )
    draw = torch.Generator().manual_seed(2)
    for name, parameter in made.named_parameters():
        if name.endswith("slope"):
            nn.init.normal_(parameter, std=steep or 0.0, generator=draw) if steep else None
    return made.eval()


VARYING = [{"weights": "token"}, {"weights": "sequence", "prefix": 3}, {"weights": "token", "rows": "block"}]
every_kind = pytest.mark.parametrize("settings", VARYING, ids=str)
IDS = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


@every_kind
@torch.no_grad()
def test_it_starts_as_the_static_hybrid_to_the_bit(settings: dict[str, Any]) -> None:
    start, static = hybrid(steep=0.0, **settings), hybrid(rows=settings.get("rows", "own"))
    assert torch.equal(start(IDS).logits, static(IDS).logits)
    assert not torch.equal(hybrid(**settings)(IDS).logits, static(IDS).logits)


@every_kind
@torch.no_grad()
def test_no_weight_depends_on_a_later_token_and_left_padding_changes_none(settings: dict[str, Any]) -> None:
    model, changed = hybrid(**settings), IDS.clone()
    changed[:, 5:] = changed[:, 5:] % (VOCAB - 2) + 2
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    with model.trace() as seen:
        model(IDS), model(changed), model(padded, attention_mask=(padded > 0).long())
    for slot, (whole, other, shifted) in ((s, [r.dense() for r in each]) for s, each in seen.items()):
        assert torch.equal(whole[:, :5], other[:, :5]), slot
        assert torch.equal(whole, other) == ("prefix" in settings)
        torch.testing.assert_close(shifted[:, 3:], whole, atol=1e-5, rtol=0)


@every_kind
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(settings: dict[str, Any]) -> None:
    model, cache, parts = hybrid(**settings), None, list[Tensor]()
    for start, end in ((0, 2), (2, 6), (6, 7), (7, 9)):
        out = model(IDS[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, model(IDS).logits[:, -2:], atol=1e-5, rtol=0)
    chosen = torch.tensor([1, 4])
    torch.testing.assert_close(model(IDS, logits_to_keep=chosen).logits, model(IDS).logits[:, chosen])


@every_kind
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generating_with_a_cache_says_the_same(settings: dict[str, Any], how: dict[str, Any]) -> None:
    model, mask = hybrid(**settings), torch.ones_like(IDS)
    said = [
        model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cached, **how)
        for cached in (True, False)
    ]
    assert torch.equal(said[0], said[1]) and said[0].shape == (2, 15)


@pytest.mark.parametrize("rows", ["own", "block"])
@pytest.mark.parametrize("draw", ["gumbel", "dirichlet"])
def test_one_draw_serves_a_whole_pass_under_checkpointing_too(rows: str, draw: str) -> None:
    model = hybrid(rows=rows).train()
    for slot in model.mixtures:
        model.row(slot).draw = draw  # type: ignore[assignment]
        model.row(slot).logits.requires_grad_(True)

    def passed() -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(7)
        with model.trace() as seen:
            loss = model(IDS, labels=IDS).loss
            loss.backward()
        assert all(len(each) == 1 for each in seen.values())
        gradients = [model.row(slot).logits.grad for slot in ("blocks.0", "blocks.1")]
        return (
            loss.detach(),
            [g.clone() for g in gradients if g is not None],
            {s: r[0].dense() for s, r in seen.items()},
        )

    loss, gradients, drawn = passed()
    ends = [drawn[slot] for slot in ("embedding", "blocks.0", "head")]
    assert all(torch.equal(end, ends[0]) for end in ends) == (rows == "block")
    assert not torch.equal(drawn["blocks.0"], drawn["blocks.1"])
    model.gradient_checkpointing_enable()
    again = passed()
    assert torch.equal(again[0], loss)
    for one, other in zip(again[1], gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


@torch.no_grad()
def test_permuting_components_permutes_the_weights_and_leaves_the_logits() -> None:
    settings: dict[str, Any] = {"steep": 0.0, "weights": "token"}
    rows = [[0.3, 0.7], [0.6, 0.4]]
    one, other = hybrid(**settings), hybrid([llama(1), neox(0)], **settings)
    one.mixture_weights, other.mixture_weights = rows, [row[::-1] for row in rows]
    for slot in one.mixtures:
        slope: Any = one.mixtures[slot].router.slope
        nn.init.normal_(slope, generator=torch.Generator().manual_seed(5))
        other.mixtures[slot].router.slope.copy_(slope.flip(0))  # type: ignore[union-attr]
    torch.testing.assert_close(one(IDS).logits, other(IDS).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_component_that_is_left_out_has_no_say_for_any_input() -> None:
    model = hybrid(weights="token")
    model.set_active([model.experts[1]])
    assert torch.equal(model(IDS).logits, llama(1)(IDS).logits)
    model.set_active(None)
    assert not torch.equal(model(IDS).logits, llama(1)(IDS).logits)


def test_input_dependent_weights_serve_two_tasks_and_static_ones_lose_one() -> None:
    """Each component masters one of two next-token maps over the same tokens, and stays as it is; what tells the tasks
    apart is which tokens are frequent. Accuracy on either task, after the same training of weights alone."""
    draw = torch.Generator().manual_seed(0)
    maps = [torch.randperm(VOCAB, generator=draw) for _ in range(2)]

    def batch(task: int, rows: int = 16) -> tuple[Tensor, Tensor]:
        odds = torch.linspace(3, -3, VOCAB).mul(1 - 2 * task).softmax(-1)
        ids = torch.multinomial(odds.expand(rows, VOCAB), 12, replacement=True, generator=draw)
        return ids, maps[task][ids]

    components = [llama(0, 24), llama(1, 24)]
    for task, component in enumerate(components):
        optimizer = torch.optim.AdamW(component.parameters(), lr=1e-2)
        for _ in range(60):
            ids, targets = batch(task)
            loss = cross_entropy(component(ids).logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad(), loss.backward(), optimizer.step()

    def accuracies(model: nn.Module) -> list[float]:
        with torch.no_grad():
            pairs = [batch(task, 64) for task in range(2)]
            return [float((model(ids).logits[:, 4:].argmax(-1) == to[:, 4:]).float().mean()) for ids, to in pairs]

    alone = [accuracies(component)[task] for task, component in enumerate(components)]
    assert min(alone) > 0.95 and max(accuracies(components[0])[1], accuracies(components[1])[0]) < 0.3
    kept: dict[str, list[float]] = {}
    for weights in ("static", "token"):
        made: Any = mw.compose("manticore", backbones=components, num_blocks=1, projectors="none", weights=weights)
        learned = [p for name, p in made.named_parameters() if ".router." in name]
        for parameter in learned:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(learned, lr=0.1, weight_decay=0.0)
        for _ in range(60):
            both = [batch(task) for task in range(2)]
            ids, targets = (torch.cat(parts) for parts in zip(*both))
            loss = cross_entropy(made(ids).logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        kept[weights] = accuracies(made.eval())
        made.remove()
    assert min(kept["token"]) > 0.85
    assert min(kept["static"]) < 0.7
