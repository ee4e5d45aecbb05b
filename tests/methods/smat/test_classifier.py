"""The few-shot classifier: scikit-learn's manners, adaptation, doubt, and a model that stays as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.hf import build_backbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.episodes import Episode
from mixwright.evaluation.calibration import HeldOut, leave_one_out
from mixwright.methods.smat.classifier import NONE_OF_THESE, FewShotClassifier, rate_by_labelled_test_episodes
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.digest import tensor_digest
from mixwright.ops.prototypes import class_means, geometric_medians
from mixwright.training.support_tuning import Diverged, folds

NAMES = np.array(["owl", "ant", "bee"])


def _pool(family: str = "vit", trained: bool = True) -> FewShotModel:
    model = mw.compose("smat", backbone=tiny_backbone(family), experts=2)
    assert isinstance(model, FewShotModel)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in model.deltas.delta.values() if trained else ():
            delta.copy_(torch.randn(delta.shape, generator=draw) * 0.05)
    return model.eval()


def _items(each: int = 4, noise: float = 0.5, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    shapes = torch.randn(3, 1, 3, 16, 16, generator=torch.Generator().manual_seed(100))
    draw = torch.Generator().manual_seed(seed)
    images = shapes + noise * torch.randn(3, each, 3, 16, 16, generator=draw)
    return images.flatten(0, 1), NAMES.repeat(each)


def test_fit_predict_and_the_model_stays_as_it_is() -> None:
    model = _pool()
    before = tensor_digest(model.backbone)
    with FewShotClassifier(model) as classifier:
        classifier.fit(*_items())
        queries, truth = _items(seed=1)
        assert classifier.classes_.tolist() == ["ant", "bee", "owl"]
        assert classifier.predict(queries).tolist() == truth.tolist() and classifier.score(queries, truth) == 1
        assert classifier.predict_proba(queries).sum(1) == pytest.approx(1)
        assert tensor_digest(model.backbone) == before
        with model.adapted(classifier.route_):
            inside = model.settled_features(queries)
        assert torch.equal(inside, model.settled_features(queries, classifier.weights()))
    assert not hasattr(classifier, "classes_")
    with pytest.raises(ValueError, match="not fitted"):
        classifier.predict(queries)


def test_predictions_do_not_depend_on_the_other_queries_nor_on_how_classes_are_numbered() -> None:
    classifier = mw.FewShotClassifier(_pool(), batch_size=2).fit(*_items())
    queries, _ = _items(seed=1, noise=2.0)
    whole = classifier.predict_proba(queries)
    np.testing.assert_allclose(classifier.predict_proba(queries[4:5]), whole[4:5], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(classifier.predict_proba(queries.flip(0))[::-1], whole, rtol=1e-4, atol=1e-6)
    items, names = _items()
    renamed = {"owl": 7, "ant": -2, "bee": 40}
    other = mw.FewShotClassifier(_pool()).fit(items, [renamed[name] for name in names])
    assert other.classes_.tolist() == [-2, 7, 40]
    np.testing.assert_allclose(other.predict_proba(queries)[:, [0, 2, 1]], whole, rtol=1e-4, atol=1e-6)


def test_supports_as_episodes_and_sets() -> None:
    items, _ = _items()
    labels = torch.arange(3).repeat_interleave(4)
    queries, _ = _items(seed=1)
    expected = mw.FewShotClassifier(_pool()).fit(items, labels).predict_proba(queries)
    episode = mw.Episode(items, labels, queries, labels, {"classes": tuple(NAMES)})
    for given in (mw.SupportSet(items, labels), (items, labels), episode):
        assert np.array_equal(mw.FewShotClassifier(_pool()).fit(given).predict_proba(queries), expected)
    assert mw.FewShotClassifier(_pool()).fit(episode).predict(queries).tolist() == NAMES.repeat(4).tolist()
    for wrong in (items, (items, labels[:5]), (items, labels * 0), (items, labels + 0.5), (items[:0], labels[:0])):
        with pytest.raises((ValueError, TypeError)):
            mw.FewShotClassifier(_pool()).fit(wrong)


def test_settings_are_scikit_learns() -> None:
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    model = _pool()
    classifier = mw.FewShotClassifier(model, prototypes="median")
    twin = base.clone(classifier)
    assert twin.model is model and twin.get_params() == classifier.get_params() and base.is_classifier(twin)
    assert twin.set_params(strength=0.5).strength == 0.5 and "prototypes='median'" in repr(twin)
    with pytest.raises(ValueError, match="no setting 'streng'"):
        twin.set_params(streng=1)
    items, names = _items()
    found = selection.cross_val_score(classifier, items.numpy(), names, cv=2)
    assert found.tolist() == [1, 1]
    for wrong in (
        {"adaptation": "half"},
        {"prototypes": "mode"},
        {"strength": 2},
        {"temperature": 0},
        {"rates": ()},
        {"folds": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mw.FewShotClassifier(model, **wrong).fit(items, names)


@pytest.mark.parametrize("adaptation", ["full", "lora", "layernorm"])
def test_gradient_steps_learn_the_support_and_no_bit_of_the_model(adaptation: Any) -> None:
    model = _pool()
    before = tensor_digest(model.backbone), {n: t.clone() for n, t in model.added_state().items()}
    items, names = _items(noise=4.0)
    direct = mw.FewShotClassifier(model).fit(items, names)
    rate = {"full": 1e-3, "lora": 1e-3, "layernorm": 1e-2}[adaptation]
    tuned = mw.FewShotClassifier(model, adaptation=adaptation, rate=rate, steps=20).fit(items, names)
    known = {name: row for row, name in enumerate(tuned.classes_)}
    rows = [known[name] for name in names]

    def loss(classifier: FewShotClassifier) -> float:
        logits = torch.from_numpy(10 * classifier.decision_function(items))
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(rows)))

    assert loss(tuned) < 0.8 * loss(direct)
    changed = {name for name, tensor in tuned.weights().items() if not torch.equal(tensor, direct.weights()[name])}
    if adaptation != "full":
        wanted = ("norm",) if adaptation == "layernorm" else ("q_proj", "v_proj", "query", "value")
        assert changed and all(any(word in name for word in wanted) for name in changed), changed
    assert tensor_digest(model.backbone) == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.added_state().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="no mixture"):
        tuned.remember("tuned")


def test_the_rate_is_chosen_on_the_support_alone() -> None:
    model = _pool()
    items, names = _items(each=6, noise=3.0)
    settings: dict[str, Any] = {"adaptation": "full", "steps": 8, "rates": (0.0, 1e-3, 1e18)}
    chosen = mw.FewShotClassifier(model, **settings).fit(items, names)
    assert chosen.rate_ in (0.0, 1e-3) and len(chosen.held_out_.labels) == 18
    again = mw.FewShotClassifier(model, **settings).fit(items, names)
    assert again.rate_ == chosen.rate_
    assert np.array_equal(again.decision_function(items), chosen.decision_function(items))
    alone = mw.FewShotClassifier(model, **settings).fit(items[::6], names[::6])
    assert alone.rate_ == 0.0  # nothing can be held out
    with pytest.raises(Diverged):
        mw.FewShotClassifier(model, adaptation="full", steps=4, rate=1e30).fit(items, names)
    episodes = [Episode(items, torch.arange(3).repeat_interleave(6), items, torch.arange(3).repeat_interleave(6))]
    assert rate_by_labelled_test_episodes(mw.FewShotClassifier(model, **settings), episodes) in (0.0, 1e-3)


def test_images_are_varied_in_gradient_steps_and_texts_are_not() -> None:
    items, names = _items()
    settings: dict[str, Any] = {"adaptation": "layernorm", "rate": 1e-2, "steps": 2}
    plain = mw.FewShotClassifier(_pool(), **settings).fit(items, names)
    varied = mw.FewShotClassifier(_pool(), augment=True, **settings).fit(items, names)
    assert not np.array_equal(plain.decision_function(items), varied.decision_function(items))
    ids = torch.randint(4, 200, (6, 7), generator=torch.Generator().manual_seed(0))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = [0, 1, 2] * 2
    mw.FewShotClassifier(_pool("distilbert"), **{**settings, "adaptation": "lora"}).fit(text, labels)
    with pytest.raises(ValueError, match="only images"):
        mw.FewShotClassifier(_pool("distilbert"), augment=True, **settings).fit(text, labels)


def test_gpt2_is_tuned_by_its_fused_queries_and_values() -> None:
    ids = torch.randint(4, 200, (6, 7), generator=torch.Generator().manual_seed(0))

    def mean_state(model: Any, inputs: Any) -> Tensor:
        return model(**inputs, output_hidden_states=True).hidden_states[-1].mean(1)

    model = mw.compose("smat", backbone=tiny_backbone("gpt2"), experts=2, features=mean_state)
    tuned = mw.FewShotClassifier(model, adaptation="lora", rate=1e-2, steps=3).fit({"input_ids": ids}, [0, 1, 2] * 2)
    base, after = model.pristine(), tuned.weights()
    name = next(name for name in base if name.endswith("c_attn.weight"))
    width = base[name].shape[0]
    moved = (after[name] != base[name]).any(0)
    assert moved[:width].any() and moved[2 * width :].any() and not moved[width : 2 * width].any()
    bare = torch.nn.Sequential(torch.nn.Linear(4, 3))
    plain = mw.compose("smat", backbone=bare, experts=2, feature_width=3)
    for kind in ("lora", "layernorm"):
        with pytest.raises(ValueError, match="this backbone has no"):
            mw.FewShotClassifier(plain, adaptation=kind, rate=1.0).fit(torch.randn(6, 4), [0, 1, 2] * 2)


def test_it_abstains_when_asked() -> None:
    items, names = _items(each=8, noise=1.0)
    classifier = mw.FewShotClassifier(_pool()).fit(items, names)
    queries, _ = _items(each=8, noise=6.0, seed=1)
    sure = classifier.predict_proba(queries).max(1)
    found = classifier.predict(queries, abstain=float(np.median(sure)))
    assert [answer is None for answer in found] == (sure < np.median(sure)).tolist()
    assert all(answer is None for answer in classifier.predict(queries, max_error=0.01))  # 24 items can't promise that
    nearest, least = classifier.decision_function(queries).max(1), classifier.held_out_.nearness(0.1)
    found = classifier.predict(queries, none_of_these=0.1)
    assert [answer == NONE_OF_THESE for answer in found] == (nearest < least).tolist() and (nearest < least).any()
    assert NONE_OF_THESE not in classifier.predict(items, none_of_these=0.0).tolist()
    with pytest.raises(ValueError, match="max_error=2"):
        classifier.predict(queries, max_error=2)


def test_thresholds_and_scales_by_hand() -> None:
    cosines = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.3], [0.5, 0.0]])
    held = HeldOut(cosines, torch.tensor([0, 0, 1, 1]))
    sure, right = held.confidence(10.0)
    assert right.tolist() == [True, True, True, False]
    assert held.threshold(10.0, 0.1) == float("inf")  # (0 + 1) / 5 > 0.1
    assert sure[3] < held.threshold(10.0, 0.2) <= sure[1] and held.threshold(10.0, 0.4) == 0.0
    assert held.nearness(0.0) == 0.0 and held.nearness(0.25) == pytest.approx(0.3)
    assert HeldOut(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).scale() == 10.0
    sharp = HeldOut(torch.tensor([[0.3, 0.2]]).repeat(50, 1), torch.zeros(50, dtype=torch.long))
    blunt = HeldOut(torch.tensor([[0.9, 0.1]]).repeat(50, 1), torch.arange(50) % 2)
    assert sharp.scale() > 20 and blunt.scale() < 2


def test_items_are_held_out_one_by_one() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    held = leave_one_out(features, torch.tensor([0, 0, 0, 1]), 2)
    assert held.labels.tolist() == [0, 0, 0]
    expected = torch.tensor([0.5, 1.0]) / torch.tensor([0.5, 1.0]).norm()
    assert held.cosines[0, 0] == pytest.approx(float(expected[0])) and held.cosines[0, 1] == -1


def test_parts_of_a_support_keep_an_item_of_each_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    parts = folds(labels, 3)
    assert sorted(row for part in parts for row in part.tolist()) == [0, 1, 2, 3, 4, 5]
    for part in parts:
        kept = [int(label) for row, label in enumerate(labels) if row not in part.tolist()]
        assert set(kept) == {0, 1, 2}


def test_geometric_medians_are_means_of_equal_items_and_hardly_move_for_garbage() -> None:
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(2, 5, generator=draw)
    labels = torch.tensor([0, 1] * 4)
    assert torch.equal(geometric_medians(one.repeat(4, 1), labels, 2), class_means(one.repeat(4, 1), labels, 2))
    features = one.repeat(4, 1) + 0.1 * torch.randn(8, 5, generator=draw)
    clean = geometric_medians(features, labels, 2)
    spoiled = features.clone()
    spoiled[0] = 1e6
    moved = geometric_medians(spoiled, labels, 2)
    assert float((moved[0] - clean[0]).norm()) < 0.5 and torch.equal(moved[1], clean[1])
    best = float((features[labels == 0] - clean[0]).norm(dim=1).sum())
    for _ in range(20):
        near = clean[0] + 0.02 * torch.randn(5, generator=draw)
        assert float((features[labels == 0] - near).norm(dim=1).sum()) >= best - 1e-4
    with_grad = features.clone().requires_grad_()
    geometric_medians(with_grad, labels, 2).sum().backward()
    assert with_grad.grad is not None and bool(with_grad.grad.isfinite().all())


def test_a_classifier_is_remembered_in_its_model_and_saved_with_it(tmp_path: Path) -> None:
    model = _pool()
    items, names = _items(noise=1.0)
    classifier = mw.FewShotClassifier(model, strength=0.7, prototypes="median").fit(items, names)
    classifier.remember("birds")
    model.save_pretrained(tmp_path / "pool")
    again = FewShotClassifier.from_model(mw.load(tmp_path / "pool", backbone=tiny_backbone("vit")), "birds")
    queries, _ = _items(seed=1, noise=3.0)
    assert np.array_equal(again.predict_proba(queries), classifier.predict_proba(queries))
    for asked in ({}, {"abstain": 0.6}, {"max_error": 0.3}, {"none_of_these": 0.1}):
        assert again.predict(queries, **asked).tolist() == classifier.predict(queries, **asked).tolist()
    with pytest.raises(ValueError, match="no adaptation 'bees'"):
        FewShotClassifier.from_model(model, "bees")


def test_queries_with_a_fault_are_named() -> None:
    classifier = mw.FewShotClassifier(_pool()).fit(*_items())
    queries, _ = _items(seed=1)
    for wrong, said in (
        (queries[:0], "query: empty"),
        (queries[:, :, :9], "cannot read items of shape"),
        (torch.cat([queries[:2], queries[:1] / 0]), "item 2 are not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            classifier.predict(wrong)


@pytest.mark.parametrize("family", ["convnext", "clip", "convolutions", "bert", "bfloat16"])
@pytest.mark.parametrize("adaptation", ["direct", "full"])
def test_every_kind_of_backbone_is_classified_with_and_left_as_it_is(family: str, adaptation: Any) -> None:
    torch.manual_seed(0)
    items, names = _items()
    given: Any = items
    settings: dict[str, Any] = {}
    if family == "convnext":
        small = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16}
        backbone = build_backbone("convnext", small, kind="encoder")
    elif family == "clip":
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        backbone = build_backbone("clip_vision_model", {**small, "image_size": 16, "patch_size": 8}, kind="encoder")
    elif family == "convolutions":
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).train()
        settings = {"feature_width": 8, "features": "mean"}
    elif family == "bert":
        backbone, ids = tiny_backbone("bert"), (items.flatten(1)[:, :9].abs() * 50).long() + 4
        given = {"input_ids": ids.clamp_max(200), "attention_mask": torch.ones_like(ids)}
    else:
        backbone = tiny_backbone("vit").to(torch.bfloat16)
    model = mw.compose("smat", backbone=backbone, experts=2, **settings)
    before = tensor_digest(backbone)
    classifier = mw.FewShotClassifier(model, adaptation=adaptation, rate=1e-3, steps=3).fit(given, names)
    assert classifier.predict_proba(given).sum(1) == pytest.approx(1, abs=1e-5)
    assert tensor_digest(backbone) == before and model.is_pristine()
    assert bool(classifier.weights()) and classifier.score(given, names) > 0.5
