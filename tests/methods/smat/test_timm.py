"""Models with timm's interface, plain torch ones and timm's own: few-shot from the first line to the saved folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mixwright as mw
from mixwright.composition.features import FeatureExtractor
from mixwright.data.batches import Batches
from mixwright.data.episode_batches import episode_batches
from mixwright.data.episode_samplers import FixedEpisodes
from mixwright.data.synthetic_episodes import image_domains
from mixwright.evaluation.fitness import fitness
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.model import FewShotModel
from mixwright.methods.smat.recipe import groups, stages
from mixwright.ops.digest import tensor_digest
from mixwright.training.fit import fit
from mixwright.training.stage import Stage

from .pools import moved


class Plain(nn.Module):
    """Nothing of timm but the names of its two halves and `num_features`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 24
        self.stem = nn.Conv2d(3, 24, 4, 4)
        self.norm = nn.GroupNorm(1, 24)
        self.head = nn.Linear(24, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(x)).relu()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((-2, -1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain()


def _timm(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=0, **settings)


def _vit() -> nn.Module:
    return _timm("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2)


def _resnet() -> nn.Module:
    return _timm("resnet10t")


BUILDS = pytest.mark.parametrize("build", [_plain, _vit, _resnet])
LABELS = torch.arange(3).repeat(2)


def _images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@BUILDS
def test_routed_adapted_exported_saved_and_classified(build: Any, tmp_path: Path) -> None:
    backbone = build()
    model = moved(_pool(backbone), spread=1.0)
    support = (_images(), LABELS)
    before = tensor_digest(backbone)
    assert float(model.route(support).weights.sum()) == pytest.approx(1)
    with model.adapted(support):
        adapted = model.settled_features(_images())
        assert tensor_digest(backbone) != before
    assert tensor_digest(backbone) == before and model.is_pristine()
    own = build().eval()
    own.load_state_dict(model.export(support))  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(FeatureExtractor(own)(_images()), adapted)
    model.save_pretrained(tmp_path / "pool")
    again = mw.load(tmp_path / "pool", backbone=build()).eval()
    assert isinstance(again, FewShotModel)
    one, other = model.export(support), again.export(support)
    assert isinstance(one, dict) and isinstance(other, dict)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with mw.FewShotClassifier(again).fit(*support) as classifier:
        assert set(classifier.predict(_images())) <= {0, 1, 2}


@BUILDS
def test_meta_tuned(build: Any) -> None:
    config = SmatConfig(experts=2, steps=3, learning_rate=0.05, sparsity=0.5)
    backbone = build()
    model = _pool(backbone)
    before = tensor_digest(backbone)
    (stage, *_) = stages(config)
    fit(model, _grouped(stage, config, model), _episodes())
    assert tensor_digest(backbone) == before  # batch statistics included
    assert any(bool(delta.any()) for delta in model.deltas.delta.values())


@pytest.mark.parametrize("build", [_vit, _resnet])
def test_a_timm_model_says_itself_how_it_wants_its_images(build: Any, tmp_path: Path) -> None:
    found = fitness(build())
    assert found.library == "timm" and not [
        one.text for one in found.findings if one.name == "features" and one.level != "good"
    ]
    model = _pool(build())
    rng = np.random.default_rng(0)
    for place in range(4):
        pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8) // (1 + place % 2)
        Image.fromarray(pixels).save(tmp_path / f"{place}.png")
    paths = [tmp_path / f"{place}.png" for place in range(4)]
    read: Any = model.read(paths)
    cfg: Any = model.backbone.pretrained_cfg
    side = 32 if build is _vit else cfg["input_size"][1]
    assert read.shape == (4, 3, side, side)
    assert float(read.max()) <= (1 - min(cfg["mean"])) / min(cfg["std"]) + 1e-3 and float(read.min()) < 0
    assert set(mw.FewShotClassifier(model).fit(paths, ["light", "dark"] * 2).predict(paths)) <= {"light", "dark"}


def _pool(backbone: nn.Module) -> FewShotModel:
    model = mw.compose("smat", backbone=backbone, experts=2, sparsity=0.5)
    assert isinstance(model, FewShotModel)
    return model


def _grouped(stage: Stage, config: SmatConfig, model: FewShotModel) -> Stage:
    from dataclasses import replace

    return replace(stage, groups=groups(config, model))


def _episodes() -> Batches:
    domains = tuple(image_domains(("strokes", "dots"), size=32, classes=6, items=6).values())
    return episode_batches(FixedEpisodes(domains=domains, ways=3, shots=2, queries=2), length=10)
