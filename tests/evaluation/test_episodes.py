"""Scores over episodes, by hand and on a tiny backbone."""

import math

import pytest
import torch
from torch import Tensor

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.episodic import EpisodicModel
from mixwright.data.domains import tensor_domain
from mixwright.data.episode_samplers import FixedEpisodes
from mixwright.data.episodes import Episode
from mixwright.evaluation.episodes import calibration_error, direct, half_width, pretrained, score


def _source() -> FixedEpisodes:
    draw = torch.Generator().manual_seed(0)
    shapes = torch.randn(6, 1, 3, 16, 16, generator=draw)
    images = (shapes + 0.3 * torch.randn(6, 8, 3, 16, 16, generator=draw)).flatten(0, 1)
    domain = tensor_domain("waves", images, [label for label in range(6) for _ in range(8)])
    return FixedEpisodes(domains=(domain,), ways=3, shots=2, queries=4, seed=1)


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.1])
    right = torch.tensor([True, False, True, False])
    assert calibration_error(confidence, right) == pytest.approx((abs(1 - 1.9) + 0.45 + 0.1) / 4)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0.0


def test_intervals_and_paired_differences() -> None:
    episodes = [
        Episode(torch.eye(2), torch.arange(2), torch.eye(2), torch.tensor(labels))
        for labels in ([0, 1], [0, 0], [1, 0], [0, 1])
    ]
    sure = score(lambda episode: 10 * episode.query, episodes, 4)
    assert sure.accuracy.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert sure.half_width == pytest.approx(1.96 * sure.accuracy.std().item() / 2)
    contrary = score(lambda episode: -episode.query, episodes, 4)
    mean, half = sure.minus(contrary)
    assert mean == pytest.approx(0.25) and half == pytest.approx(half_width(torch.tensor([1.0, 0.0, -1.0, 1.0])))
    assert math.isnan(score(lambda episode: episode.query, episodes, [2]).half_width)
    assert sure.plain()["queries"] == 8


def test_query_labels_are_hidden_and_faults_are_named() -> None:
    episode = Episode(torch.eye(2), torch.arange(2), torch.eye(2), torch.tensor([0, 1]), {"domain": "birds"})

    def curious(episode: Episode) -> Tensor:
        assert episode.query_labels is None
        return episode.query

    assert score(curious, [episode], 1).mean == 1.0
    with pytest.raises(ValueError, match="birds.*not finite"):
        score(lambda episode: episode.query / 0, [episode], 1)
    with pytest.raises(ValueError, match="no episodes"):
        score(curious, [episode], 0)


def test_direct_scores_a_model_as_it_is_adapted_and_leaves_it_as_it_was() -> None:
    model = mw.compose("smat", backbone=tiny_backbone("vit"), experts=2)
    assert isinstance(model, EpisodicModel)
    fresh = score(direct(model), _source(), 3)
    assert torch.equal(fresh.confidence, score(pretrained(model), _source(), 3).confidence)
    with torch.no_grad():
        for delta in model.mixture.experts.parameters():
            delta.add_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)))
    before = {name: parameter.clone() for name, parameter in model.backbone.named_parameters()}
    moved = score(direct(model), _source(), 3)
    assert not torch.equal(fresh.confidence, moved.confidence)
    assert torch.equal(score(direct(model, strength=0.0), _source(), 3).confidence, fresh.confidence)
    episode = _source().episode(1)
    with model.adapted(episode.support_set):
        inside = score(pretrained(model), _source(), 3)
        assert torch.equal(inside.confidence, fresh.confidence)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.backbone.named_parameters())
