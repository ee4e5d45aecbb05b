"""Signatures against plain sums over the real tokens, whatever the batches, the padding and the streams."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.composition.signatures import Moments, collect_signatures
from mixwright.experts.lora import LoraExperts
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.signature import SignatureScores, out_of_pool, out_of_pool_sequence, redundancy
from mixwright.routers.token import TokenRouter
from mixwright.sites import linear_sites


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    ).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


TEXTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14]]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def by_hand(model: nn.Module, sites: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every input row of every site, one text at a time, without padding."""
    rows: dict[str, list[Tensor]] = {site: [] for site in sites}
    hooks = [
        model.get_submodule(site).register_forward_pre_hook(
            lambda _, args, site=site: rows[site].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for site in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {site: torch.cat(found).double() for site, found in rows.items()}


def check(found: dict[str, Tensor], rows: Tensor) -> None:
    assert found["count"] == len(rows)
    torch.testing.assert_close(found["mean"], rows.mean(0).float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["variance"], rows.var(0, unbiased=False).float(), atol=1e-6, rtol=1e-5)
    if "factor" in found:
        values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))
        kept = len(found["factor"])
        best = (vectors[:, -kept:] * values[-kept:]) @ vectors[:, -kept:].T
        torch.testing.assert_close(found["factor"].T @ found["factor"], best.float(), atol=1e-4, rtol=1e-3)


def test_an_encoders_signature_is_the_mean_over_all_real_tokens() -> None:
    model = bert()
    sites = [path for path in linear_sites(model) if not path.startswith("pooler")]
    expected = by_hand(model, sites, [padded([text]) for text in TEXTS])
    for batches in ([padded(TEXTS)], [padded(TEXTS[:1]), padded(TEXTS[1:])]):
        found = collect_signatures(model, batches, sites, rank=3)
        assert list(found) == sites
        for site in sites:
            check(found[site], expected[site])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_stream_of_an_encoder_decoder_has_its_own_tokens() -> None:
    model = t5()
    sites = [path for path in linear_sites(model) if path != "lm_head"]
    targets = [[3, 4], [5, 6, 7], [8], [9, 10, 11, 12]]
    labels = torch.tensor([row + [-100] * (4 - len(row)) for row in targets])
    alone = [{**padded([text]), "labels": torch.tensor([row])} for text, row in zip(TEXTS, targets, strict=True)]
    expected = by_hand(model, sites, alone)
    found = collect_signatures(model, [{**padded(TEXTS), "labels": labels}], sites, rank=0)
    for site in sites:
        check(found[site], expected[site])
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert found[f"{cross}.k"]["count"] == sum(map(len, TEXTS))
    assert found[f"{cross}.q"]["count"] == sum(map(len, targets))


def test_a_composed_model_is_seen_in_the_state_it_is_in() -> None:
    backbone = bert()
    plain = collect_signatures(backbone, [padded(TEXTS)])
    draw = torch.Generator().manual_seed(0)
    sites = list(plain)
    mixtures: dict[str, Mixture] = {}
    for path in sites:
        layer = backbone.get_submodule(path)
        factors: list[Any] = [
            (torch.randn(2, layer.in_features, generator=draw), torch.randn(layer.out_features, 2, generator=draw), 0.3)
            for _ in range(2)
        ]
        router = TokenRouter(PrototypeScores(torch.randn(2, layer.in_features, generator=draw)), 1)
        mixtures[path] = Mixture(layer, router, LoraExperts.stack(factors))
    model = ComposedModel(backbone, mixtures, ["a", "b"])
    with model.disabled():
        off = collect_signatures(model, [padded(TEXTS)])
    with model.only("a"):
        only = collect_signatures(model, [padded(TEXTS)], rank=0)
    last = "encoder.layer.1.output.dense"
    torch.testing.assert_close(off[last], plain[last])
    assert not torch.allclose(only[last]["mean"], plain[last]["mean"])
    assert "factor" not in only[last]


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="no real token reached"):
        collect_signatures(bert(), [])


@pytest.mark.parametrize("d_in", [6, 40, 300])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streaming_is_exact_for_any_cut(d_in: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(d_in)
    basis = torch.randn(5, d_in, dtype=torch.float64, generator=generator)
    rows = torch.randn(700, 5, dtype=torch.float64, generator=generator) @ basis + offset
    moments = Moments(d_in, 5, torch.device("cpu"))
    for piece in rows.split([1, 2, 300, 397]):
        moments.add(piece)
    found = moments.signature()
    torch.testing.assert_close(found["mean"].double(), rows.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found["variance"].double(), rows.var(0, unbiased=False), atol=1e-4, rtol=1e-5)
    covariance = found["factor"].double().T @ found["factor"].double()
    torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0), atol=1e-3, rtol=1e-4)


def gaussians(factor: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Three texts with one covariance of rank 3 plus noise, and their signatures."""
    generator = torch.Generator().manual_seed(5)
    mixing = 2 * torch.randn(3, 24, generator=generator)
    texts = [
        torch.randn(3000, 3, generator=generator) @ mixing
        + 0.5 * torch.randn(3000, 24, generator=generator)
        + 0.4 * torch.randn(24, generator=generator)
        + 7
        for _ in range(3)
    ]
    signatures: list[dict[str, Tensor]] = []
    for text in texts:
        moments = Moments(24, 4 if factor else 0, torch.device("cpu"))
        moments.add(text)
        signatures.append(moments.signature())
    return texts, signatures


def dense_discriminant(x: Tensor, signatures: list[dict[str, Tensor]], covariance: Tensor) -> Tensor:
    """-1/2 Mahalanobis distance to each mean, as the textbook has it."""
    between = x.double()[:, None] - torch.stack([s["mean"] for s in signatures]).double()
    return -0.5 * torch.einsum("tei,ij,tej->te", between, torch.linalg.inv(covariance), between)


@pytest.mark.parametrize("factor", [False, True], ids=["diagonal", "factor"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_scores_are_the_textbooks_discriminant(factor: bool, shrinkage: float) -> None:
    texts, signatures = gaussians(factor)
    covariance = torch.stack([s["variance"] for s in signatures]).double().mean(0).diag()
    if factor:
        each = torch.stack([s["factor"].double().T @ s["factor"].double() for s in signatures]).mean(0)
        covariance = covariance + each - each.diagonal().diag()
    covariance = (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().diag()
    expected = torch.log_softmax(dense_discriminant(texts[0][:50], signatures, covariance), -1).float()
    scores = SignatureScores.from_signatures(signatures, shrinkage=shrinkage, temperature=1.0)
    found = torch.log_softmax(scores(texts[0][:50]), -1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    cold = SignatureScores.from_signatures(signatures, shrinkage=shrinkage, temperature=2.0)(texts[0][:50])
    torch.testing.assert_close(2 * cold, scores(texts[0][:50]), atol=1e-3, rtol=1e-4)
    usual = SignatureScores.from_signatures(signatures, shrinkage=shrinkage)(texts[0][:50])
    torch.testing.assert_close((3 if factor else 10) * usual, scores(texts[0][:50]), atol=2e-3, rtol=1e-4)


def test_directions_make_the_discriminant_better_and_calmer() -> None:
    right, size = {}, {}
    for factor in (False, True):
        texts, signatures = gaussians(factor)
        scores = SignatureScores.from_signatures(signatures, shrinkage=0.0)
        found = [scores(text) for text in texts]
        right[factor] = sum(float((out.argmax(-1) == z).float().mean()) for z, out in enumerate(found)) / 3
        size[factor] = float(torch.stack(found).mean(-1).abs().mean())
    assert right[True] > right[False] + 0.2
    assert right[True] > 0.9


def test_redundancy_and_distance() -> None:
    texts, signatures = gaussians(factor=True)
    same = redundancy([*signatures, signatures[0]], shrinkage=0.0)
    torch.testing.assert_close(same.diagonal(), torch.ones(4))
    torch.testing.assert_close(same, same.T)
    assert same[0, 3] > 0.999
    assert same[0, 1] < 0.5
    inside = out_of_pool(texts[1], signatures, shrinkage=0.0)
    assert 0.8 < float(inside.mean()) < 1.2
    assert float(out_of_pool(texts[1] + 3.0, signatures, shrinkage=0.0).mean()) > 5.0
    mask = torch.tensor([[True, True, False]])
    both = out_of_pool_sequence(texts[1][None, :3], signatures, mask, shrinkage=0.0)
    torch.testing.assert_close(both, inside[:2].mean()[None])


def test_shrinkage_and_temperature_are_checked() -> None:
    _, signatures = gaussians(factor=False)
    with pytest.raises(ValueError, match="shrinkage=2"):
        SignatureScores.from_signatures(signatures, shrinkage=2.0)
    with pytest.raises(ValueError, match="temperature=0"):
        SignatureScores.from_signatures(signatures, temperature=0.0)
    with pytest.raises(ValueError, match="no expert of the pool has a signature"):
        SignatureScores.from_signatures([None, None])
