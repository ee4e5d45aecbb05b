"""A hybrid under a composed model: traces, overrides, generating and removing work as for any other backbone."""

from typing import Any

import pytest
import torch
from torch import nn

from mixwright.backbones.hybrid import HybridBackbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.blocks import BlockExperts, EmbeddingExperts, HeadExperts
from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routers.routed_weights import RoutedMixtureWeights
from mixwright.routing import Routing

torch.set_num_threads(1)
IDS = torch.randint(4, 264, (2, 7), generator=torch.Generator().manual_seed(0))
NAMES = ("first", "second")
SITES = ("embedding", "blocks.0", "blocks.1", "head")


def components() -> list[nn.Module]:
    return [tiny_backbone("gpt_neox", initializer_range=0.3), tiny_backbone("mamba2", seed=1)]


def composed(given: list[nn.Module], *, routed: bool = False) -> ComposedModel:
    hybrid: Any = HybridBackbone(given, 2, NAMES)
    torch.manual_seed(0)
    mixtures: dict[str, Mixture] = {}
    for site in SITES:
        run = hybrid.get_submodule(site).run
        kind = {"embedding": EmbeddingExperts, "head": HeadExperts}.get(site, BlockExperts)
        router: Any = MixtureWeights(2)
        if routed and site != "embedding":
            router = RoutedMixtureWeights(router, hybrid.width)
            nn.init.normal_(router.slope)
        mixtures[site] = Mixture(None, router, kind(run, hybrid.widths))
    return ComposedModel(hybrid, mixtures, NAMES).eval()


def calls(module: nn.Module) -> list[int]:
    """Grows with every call of a component that a hybrid does not cut into."""
    made: list[int] = []
    module.register_forward_pre_hook(lambda *_: made.append(1))
    return made


@torch.no_grad()
def test_one_expert_alone_is_the_component_and_the_trace_says_so() -> None:
    given = components()
    expected = [(c(IDS).logits, c.generate(IDS, max_new_tokens=4, num_beams=2)) for c in given]  # type: ignore[operator]
    model = composed(given)
    for m, name in enumerate(NAMES):
        with model.only(name), model.trace() as trace:
            logits = model(IDS).logits
        with model.only(name):
            tokens = model.generate(IDS, max_new_tokens=4, num_beams=2)
        assert torch.equal(logits, expected[m][0])
        assert torch.equal(tokens, expected[m][1])
        assert {site: [routing.dense().tolist() for routing in passes] for site, passes in trace.items()} == {
            site: [[float(i == m) for i in range(2)]] for site in SITES
        }


@torch.no_grad()
def test_a_component_that_is_alone_everywhere_runs_in_one_go() -> None:
    given = components()
    model = composed(given)
    for site in SITES:
        model.mixtures[site].router.set(torch.tensor([1.0, 0.0]))
    cut: list[int] = []
    swap = model.backbone.coroutine

    class Counted(swap):  # type: ignore[misc, valid-type]
        def start(self) -> Any:
            cut.append(1)
            return super().start()

    model.backbone.coroutine = Counted
    with model.trace() as trace:
        fast = model(IDS).logits
    assert not cut, "the component was cut though nobody else acts"
    assert [len(trace[site]) for site in SITES] == [1, 1, 1, 1]
    watched = calls(model.mixtures["blocks.0"])
    assert torch.equal(model(IDS).logits, fast)
    assert (cut, watched) == ([1], [1]), "a mixture that is watched was left out"
    model.mixtures["head"].router.set(torch.tensor([0.5, 0.5]))
    model(IDS)
    assert len(cut) == 3
    with model.disabled():
        assert torch.equal(model(IDS).logits, fast)


@torch.no_grad()
def test_going_in_one_go_and_being_cut_leave_the_same_cache() -> None:
    model = composed(components())
    for site in SITES:
        model.mixtures[site].router.set(torch.tensor([0.0, 1.0]))
    plain = model(IDS, use_cache=True)
    handle = model.mixtures["head"].register_forward_hook(lambda *_: None)
    cut = model(IDS, use_cache=True)
    step = torch.tensor([[5], [6]])
    ours = model(step, past_key_values=plain.past_key_values).logits
    handle.remove()
    assert torch.equal(model(step, past_key_values=cut.past_key_values).logits, ours)


def _soft() -> Any:
    model = composed(components())
    for site, share in zip(SITES, (0.3, 0.4, 0.6, 0.7), strict=True):
        model.mixtures[site].router.set(torch.tensor([share, 1 - share]))
    model.requires_grad_(True)
    return model


def test_slots_are_passed_straight_while_nothing_is_learned_or_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = _soft(), Mixture.forward
    called: list[str] = []

    def counted(mixture: Mixture, *args: Any) -> Any:
        called.append(mixture.site)
        return plain(mixture, *args)

    monkeypatch.setattr(Mixture, "forward", counted)
    learned = model(IDS).logits
    assert called == list(SITES), "gradients need every slot"
    called.clear()
    with torch.no_grad():
        model(IDS)  # routers remember what they say
        called.clear()
        straight = model(IDS).logits
        assert not called, "a slot was called though nothing is learned"
        torch.testing.assert_close(straight, learned.detach(), rtol=1e-5, atol=1e-6)
        with model.trace() as trace:
            assert torch.equal(model(IDS).logits, straight)
        assert list(trace) == called == list(SITES)
        called.clear()
        watched = calls(model.mixtures["blocks.0"].router)
        assert torch.equal(model(IDS).logits, straight)
        assert (called, watched) == (["blocks.0"], [1])
        with model.disabled():
            assert not torch.equal(model(IDS).logits, straight)
        with model.routed_by(Routing(torch.tensor([0.25, 0.75]), 2)):
            assert not torch.equal(model(IDS).logits, straight)
        model.mixtures["head"].router.set(torch.tensor([0.1, 0.9]))
        changed = model(IDS).logits
    expected = model(IDS)
    torch.testing.assert_close(changed, expected.logits.detach(), rtol=1e-5, atol=1e-6)
    expected.logits.sum().backward()
    assert all(model.mixtures[site].router.logits.grad is not None for site in SITES)


def test_hooks_on_all_modules_see_every_slot() -> None:
    model, seen = _soft(), list[str]()
    with torch.no_grad():
        straight = model(IDS).logits
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(module.site) if isinstance(module, Mixture) else None
        )
        try:
            assert torch.equal(model(IDS).logits, straight)
        finally:
            handle.remove()
    assert seen == list(SITES)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_routers_remember_travels_with_the_cache(beams: int) -> None:
    model = composed(components(), routed=True)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    with model.trace() as trace:
        cached = model.generate(IDS, attention_mask=mask, **options)
    assert torch.equal(model.generate(IDS, attention_mask=mask, use_cache=False, **options), cached)
    assert len(trace["blocks.1"]) == 5
    weights = trace["blocks.1"][0].dense()
    assert weights.shape[:2] == (2 * beams, 7)
    assert (weights[:, 0] != weights[:, 1]).any(), "the weights do not depend on the token"


@torch.no_grad()
def test_a_foreign_routing_rules_every_slot() -> None:
    given = components()
    model = composed(given)
    with model.routed_by(Routing(torch.tensor([0.25, 0.75]), 2)):
        ruled = model(IDS).logits
    for site in SITES:
        model.mixtures[site].router.set(torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(model(IDS).logits, ruled)


@torch.no_grad()
def test_removing_gives_the_hybrid_back_as_it_was() -> None:
    given = components()
    expected = given[0](IDS).logits
    model = composed(given)
    hybrid = model.remove()
    assert torch.equal(hybrid(IDS).logits, expected)
    assert all(parameter.requires_grad for parameter in hybrid.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in hybrid.modules())
