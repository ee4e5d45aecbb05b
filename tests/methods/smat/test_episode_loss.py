"""The loss of an episode against the formulas, written out once more with autograd through everything."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, log_softmax, normalize

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.episodes import Episode
from mixwright.experts import sparse_deltas
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.episode_loss import EpisodeLoss
from mixwright.methods.smat.known_gradient import promise
from mixwright.methods.smat.model import FewShotModel
from mixwright.methods.smat.sparsity_term import sparsity_term
from mixwright.ops.digest import tensor_digest
from mixwright.training.stage import JointObjective

RATES = {"inner_rate": 0.3, "teacher_rate": 0.5}  # large, so that what they do is seen


class Net(nn.Module):
    """Features of images, with batch normalisation and dropout where asked for."""

    num_features = 12

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.norm = nn.BatchNorm2d(12) if batch_norm else nn.GroupNorm(3, 12)
        self.out = nn.Linear(12, 12)
        self.unread = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.stem(x))).mean((2, 3)))


def _model(config: SmatConfig, *, batch_norm: bool = False, dtype: torch.dtype = torch.float64) -> FewShotModel:
    fields = {name: getattr(config, name) for name in ("experts", "masks", "router", "sparsity", "exclude")}
    model = mw.compose("smat", backbone=Net(batch_norm), feature_width=12, **fields).to(dtype).train()
    assert isinstance(model, FewShotModel)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in model.deltas.delta.values():
            delta.copy_(torch.randn(delta.shape, generator=draw) * 0.2)
        if config.masks == "learned":
            for logits in model.deltas.logits.values():
                logits.copy_(torch.randn(logits.shape, generator=draw) * 2)
            model.deltas.multipliers.copy_(torch.arange(1, config.experts + 1) / 10)
    model.requires_grad_(True)
    model.backbone.requires_grad_(False)
    return model


def _episode(dtype: torch.dtype = torch.float64, queries: int = 7) -> Episode:
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(8 + queries, 3, 16, 16, generator=draw, dtype=torch.float64).to(dtype)
    return Episode(
        images[:8],
        torch.tensor([0, 1, 2, 0, 1, 2, 0, 0]),
        images[8:],
        torch.arange(queries) % 3,
        {"domain": "noise", "index": 4},
    )


def _plain(model: FewShotModel, episode: Episode, config: SmatConfig, rows: Tensor | None = None) -> Tensor:
    """Sheet a5, line by line."""
    base = {name: parameter.detach() for name, parameter in model.backbone.named_parameters()}

    def features(weights: dict[str, Tensor], x: Any) -> Tensor:
        return functional_call(model.backbone, weights, (x,))

    def means(f: Tensor) -> Tensor:
        return torch.stack([f[episode.labels == c].mean(0) for c in range(3)])

    def logits_of(f: Tensor, head: Tensor) -> Tensor:
        return 10 * normalize(f, dim=-1) @ normalize(head, dim=-1).T

    gates = model.router.logits(features(base, episode.support), episode.labels)
    alpha = model.router.routing(gates).weights
    logits = model.deltas.logits
    z = {n: (torch.sigmoid(logits[n.replace(".", "/")] * 1.5) * 1.2 - 0.1).clamp(0, 1) for n in base}
    share = {n: torch.einsum("m, m ... -> ...", alpha, z[n]) for n in base}
    theta = {n: base[n] + share[n] * model.deltas.delta[n.replace(".", "/")] for n in base}
    theta = {n: t for n, t in theta.items() if not n.startswith("unread")} | {
        n: t for n, t in base.items() if n.startswith("unread")
    }
    names = [n for n in theta if not n.startswith("unread")]

    supported = features(theta, episode.support)
    head = means(supported)
    if config.inner_rate:
        leaf = head.detach().requires_grad_()
        inner = cross_entropy(logits_of(supported, leaf), episode.labels)
        *found, on_head = torch.autograd.grad(inner, [*(theta[n] for n in names), leaf], retain_graph=True)
        theta = theta | {n: theta[n] - config.inner_rate * g for n, g in zip(names, found, strict=True)}
        head = head - config.inner_rate * on_head
    student = logits_of(features(theta, episode.query), head)
    ce = cross_entropy(student, episode.query_labels)
    leaves = {n: t.detach().requires_grad_() for n, t in theta.items()}
    leaf = head.detach().requires_grad_()
    alone = cross_entropy(logits_of(features(leaves, episode.query), leaf), episode.query_labels)
    *found, on_head = torch.autograd.grad(alone, [*(leaves[n] for n in names), leaf])
    stepped = leaves | {n: leaves[n] - config.teacher_rate * g for n, g in zip(names, found, strict=True)}
    teacher = logits_of(features(stepped, episode.query), leaf - config.teacher_rate * on_head).detach()
    pretrained = logits_of(features(base, episode.query), means(features(base, episode.support)))
    rows = torch.arange(len(student)) if rows is None else rows
    kd = torch.zeros((), dtype=torch.float64)
    for asked, target in ((config.from_teacher, teacher), (config.from_pretrained, pretrained)):
        if asked:
            p, q = (log_softmax(each[rows] / 2, -1) for each in (target, student))
            kd = kd + 0.5 * 4 * (p.exp() * (p - q)).sum(-1).mean()
    w = config.distillation if config.distils else 0.0
    loss = (1 - w) * ce + w * kd + config.gate_penalty * gates.square().mean()
    return loss + sparsity_term(model.deltas, alpha[None], config.sparsity, config.floor)


CASES = {
    "paper": {},
    "no inner step": {"inner_rate": 0.0},
    "teacher alone": {"from_pretrained": False},
    "pretrained alone": {"from_teacher": False},
    "cross-entropy alone": {"distillation": 0.0},
    "distillation alone": {"distillation": 1.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_value_and_gradients_are_those_of_autograd_through_the_formulas(case: str, share: float) -> None:
    config = SmatConfig(experts=3, **{**RATES, **CASES[case]}, distilled=share)  # type: ignore[arg-type]
    model, episode = _model(config), _episode()
    twin, loss = deepcopy(model), EpisodeLoss(config)
    torch.manual_seed(5)
    rows = loss._parts(7, torch.device("cpu"))
    loss._parts = lambda queries, device: rows  # type: ignore[method-assign]
    torch.manual_seed(6)
    found = loss(model, episode)
    torch.manual_seed(6)
    expected = _plain(twin, episode, config, rows[0])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found.backward()
    expected.backward()
    assert len(rows) == (2 if share < 1 and config.distils else 1)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if "unread" in name and "experts" in name:
            continue  # only the constraint reaches it
        if not name.startswith("backbone"):
            assert other.grad is not None and one.grad is not None, name
            assert other.grad.abs().max() > 0, name
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_each_pass_is_made_once_and_the_teachers_step_costs_none() -> None:
    rows: dict[str, int] = {"frozen": 0, "graph": 0, "no graph": 0}
    config = SmatConfig(experts=3)
    model, episode = _model(config), _episode()

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        trained = module.stem.weight.requires_grad
        kind = "frozen" if not trained else "graph" if torch.is_grad_enabled() else "no graph"
        rows[kind] += len(args[0])

    model.backbone.register_forward_pre_hook(count)
    EpisodeLoss(config)(model, episode).backward()
    assert rows == {"frozen": 15, "graph": 15, "no graph": 7}


def test_frozen_features_of_items_seen_before_are_not_computed_again() -> None:
    config = SmatConfig(experts=3, frozen_cache=100)
    model, episode = _model(config), _episode()
    loss, plain = EpisodeLoss(config), EpisodeLoss(SmatConfig(experts=3))
    values = []
    for each in (loss, loss, plain):
        torch.manual_seed(0)
        values.append(each(deepcopy(model), episode))
    assert loss.frozen.passes == 15
    assert torch.equal(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    small = EpisodeLoss(SmatConfig(experts=3, frozen_cache=5))
    small(model, episode)
    assert len(small.frozen._kept) == 5


def test_in_evaluation_no_query_label_is_read_and_no_teacher_runs() -> None:
    config = SmatConfig(experts=3)
    model, episode = _model(config).eval(), _episode()
    loss = EpisodeLoss(config)
    blind = Episode(episode.support, episode.labels, episode.query)
    expected = loss.predict(model, episode)
    assert torch.equal(loss.predict(model, blind), expected)
    passes: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    assert torch.equal(loss(model, episode), cross_entropy(expected, episode.query_labels))
    assert passes == [8, 8, 7]  # frozen support, support, queries
    order = torch.tensor([3, 0, 2])
    other = Episode(episode.support, episode.labels, episode.query[order])
    torch.testing.assert_close(loss.predict(model, other), expected[order])
    with pytest.raises(ValueError, match="noise#4: query_labels: missing|episode#"):
        loss(model.train(), blind)


def test_batch_norm_keeps_its_statistics() -> None:
    config = SmatConfig(experts=2)
    model, episode = _model(config, batch_norm=True), _episode()
    before = tensor_digest(model.backbone)
    for _ in range(2):
        EpisodeLoss(config)(model, episode).backward()
    assert tensor_digest(model.backbone) == before
    assert not model.backbone.norm.training and model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_masks_multipliers_and_merge_stay_float32(dtype: torch.dtype) -> None:
    config = SmatConfig(experts=3, distilled=0.5)
    model, episode = _model(config, dtype=torch.float32), _episode(torch.float32)
    twin = deepcopy(model)
    grads = []
    for each, half in ((model, True), (twin, False)):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=half):
            loss = EpisodeLoss(config)(each, episode)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in each.mixture.experts.parameters() if p.grad is not None)
        grads.append(each.deltas.delta["stem/weight"].grad)
    cosine = torch.nn.functional.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0)
    assert cosine > 0.98


def test_every_part_of_the_pool_learns_also_after_a_move() -> None:
    config = SmatConfig(experts=3, inner_rate=0.1)
    model = _model(config).to(torch.float32).to(torch.float64).to("cpu")
    names = dict(model.named_parameters())
    for name in ("mixture.router.keys", "mixture.router.tokens", "mixture.experts.multipliers"):
        assert name in names and name in model.state_dict()
    EpisodeLoss(config)(model, _episode()).backward()
    for name, parameter in names.items():
        if name.startswith("mixture") and "base" not in name and "unread" not in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_tied_weight_is_changed_once() -> None:
    backbone = tiny_backbone("gpt2")
    model = mw.compose("smat", backbone=backbone, experts=2)
    assert isinstance(model, FewShotModel)
    assert "lm_head.weight" not in model.deltas.names and "transformer.wte.weight" in model.deltas.names


def test_experts_that_were_put_in_by_hand_are_those_that_learn() -> None:
    config = SmatConfig(experts=3)
    model = _model(config)
    with model.only("expert-1"):
        EpisodeLoss(config)(model, _episode()).backward()
    grad = model.deltas.logits["out/weight"].grad
    assert grad is not None and grad[1].abs().max() > 1e3 * grad[0].abs().max()
    assert model.router.keys.grad is None


def _another(episode: Episode) -> Episode:
    return Episode(episode.support.flip(0), episode.labels, -episode.query, episode.query_labels, {})


@pytest.mark.parametrize("settings", [{}, {"distillation": 0.0, "inner_rate": 0.0}, {"router": "uniform"}])
def test_episodes_together_are_the_sum_of_each_alone(settings: dict[str, Any]) -> None:
    config = SmatConfig(experts=3, **{**RATES, **settings})
    model, episodes = _model(config), [_episode(), _another(_episode()), _episode()]
    again, loss = deepcopy(model), EpisodeLoss(config)  # the router's spectral norms move with every routing
    torch.manual_seed(0)
    alone = sum(loss(again, episode) for episode in episodes)
    torch.manual_seed(0)
    together = loss.together(model, episodes)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    found = [
        (value, [p for p in m.parameters() if p.requires_grad]) for value, m in ((together, model), (alone, again))
    ]
    grads = (torch.autograd.grad(value, learning, allow_unused=True) for value, learning in found)
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_noise_is_drawn_for_each_episode_anew() -> None:
    model = _model(SmatConfig(experts=2))
    model.deltas.noise = True
    routing = model.routing(_episode().support_set)
    first, second = model.weights_for_each([routing, routing])
    assert not torch.equal(first["out.weight"], second["out.weight"])


def test_what_was_promised_serves_one_pass() -> None:
    x = torch.ones(3, requires_grad=True)
    zero, gradients = promise([x])
    with pytest.raises(RuntimeError, match="1 gradients were promised, 0 are there"):
        zero.backward(retain_graph=True)
    gradients.append(torch.arange(3.0))
    (2 * zero).backward()
    assert zero == 0 and torch.equal(x.grad, 2 * torch.arange(3.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [1, 4])
def test_the_training_loop_hands_it_the_episodes_of_an_update(at_once: int) -> None:
    loss = EpisodeLoss(SmatConfig(at_once=at_once))
    assert isinstance(loss, JointObjective) and loss.at_once == at_once


def test_episodes_together_pass_over_each_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    each = sparse_deltas.interpolate_each

    def counted(base: Tensor, delta: Tensor, logits: Tensor, weights: Tensor, *rest: Any, **more: Any) -> Any:
        asked.append(len(weights))
        return each(base, delta, logits, weights, *rest, **more)

    monkeypatch.setattr(sparse_deltas, "interpolate_each", counted)
    config = SmatConfig(experts=3)
    model = _model(config)
    EpisodeLoss(config).together(model, [_episode()] * 3)
    assert asked == [3] * len(model.deltas.names)


def test_without_gradients_several_routings_are_served_as_one_is() -> None:
    model = _model(SmatConfig(experts=2), dtype=torch.float32).eval()
    model.deltas.binarise()
    with torch.no_grad():
        routing = model.routing(_episode(torch.float32).support_set)
        alone = model.weights_for(routing)
        for found in (*model.weights_for_each([routing]), *model.weights_for_each([routing] * 2)):
            assert all(torch.equal(found[name], alone[name]) for name in alone)
