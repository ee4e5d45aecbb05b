"""Thresholds from held-out data, fallbacks put into models and taken out again, kept usage."""

from typing import Any

import pytest
import torch

from mixwright.evaluation.neuron_usage import usage
from mixwright.evaluation.selective import coverages
from mixwright.experts.dense_branch import DenseNeurons
from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import initial_rows
from mixwright.methods.peer.unsure import (
    coverage_thresholds,
    flag_unsure,
    lean_unsure,
    retrieve_adaptively,
    retrieve_plainly,
    taken_apart,
    widen_unsure,
)
from mixwright.methods.peer.usage import forget_usage, keep_usage, kept_usage
from mixwright.routers.product_key import ProductKeyRouter

from .neuron_model import SITES, batches, neuron_model


def dense() -> dict[str, DenseNeurons]:
    return {site: DenseNeurons(initial_rows(5, 2, 32, 0.5)) for site in SITES}


def test_thresholds_flag_the_wanted_share_of_each_head_of_each_layer() -> None:
    model, data = neuron_model(), batches(6)
    limits = coverage_thresholds(model, data, quantile=0.2)
    assert {site: limit.shape for site, limit in limits.items()} == dict.fromkeys(SITES, (2,))
    assert len({round(float(v), 6) for limit in limits.values() for v in limit}) == 4
    flag_unsure(model, limits)
    with usage(model) as meter:
        for batch in data:
            model(**batch)
    for site in SITES:
        share = meter[site].flagged
        assert share is not None and meter[site].tokens == 6 * 30
        torch.testing.assert_close(share, torch.full((2,), 0.2).double(), atol=0.01, rtol=0)
    none = coverage_thresholds(model, data, quantile=0.0)
    flag_unsure(model, none)
    with usage(model) as meter:
        for batch in data:
            model(**batch)
    assert all(not found.flagged.any() for found in meter.usage().values())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="quantile=1.5"):
        coverage_thresholds(model, data, 1.5)


@pytest.mark.parametrize("fallback", ["flag", "widen", "lean", "adaptive"])
def test_a_threshold_of_zero_is_the_plain_model_to_the_bit(fallback: str) -> None:
    model, batch = neuron_model(), batches(1)[0]
    plain = model(**batch).logits
    zero = {site: torch.zeros(2) for site in SITES}
    put: dict[str, Any] = {
        "flag": lambda t: flag_unsure(model, t),
        "widen": lambda t: widen_unsure(model, t, wider=12),
        "lean": lambda t: lean_unsure(model, t, dense()),
        "adaptive": lambda t: retrieve_adaptively(model, 1.0, 4),
    }
    put[fallback](zero)
    assert torch.equal(model(**batch).logits, plain)
    if fallback == "adaptive":
        retrieve_adaptively(model, 0.3, 4)
    else:
        put[fallback](coverage_thresholds(model, [batch], 0.3))
    assert torch.equal(model(**batch).logits, plain) == (fallback == "flag")
    retrieve_plainly(model)
    assert torch.equal(model(**batch).logits, plain)
    for mixture in model.mixtures.values():
        assert isinstance(mixture.router, ProductKeyRouter) and isinstance(mixture.experts, NeuronExperts)


@pytest.mark.parametrize("fallback", ["plain", "flag", "widen", "lean", "adaptive"])
def test_what_stands_around_a_router_comes_back_from_its_tensors(fallback: str) -> None:
    model, batch = neuron_model(), batches(1)[0]
    limits = coverage_thresholds(model, [batch], 0.3)
    if fallback == "flag":
        flag_unsure(model, limits)
    elif fallback == "widen":
        widen_unsure(model, limits, 12)
    elif fallback == "lean":
        lean_unsure(model, limits, dense())
    elif fallback == "adaptive":
        retrieve_adaptively(model, 0.3, 9)
    logits, state = model(**batch).logits, model.added_state()
    other = neuron_model()
    for site, mixture in other.mixtures.items():
        parts = [
            {name.removeprefix(f"{site}.{part}."): t for name, t in state.items() if name.startswith(f"{site}.{part}.")}
            for part in ("router", "experts")
        ]
        router, experts, around = taken_apart(*parts, "gelu")
        mixture.router.load_state_dict(router)
        mixture.experts.load_state_dict(experts)
        mixture.router, mixture.experts = around.router(mixture.router), around.experts(mixture.experts)
        assert type(mixture.router) is type(model.mixtures[site].router)
    assert torch.equal(other(**batch).logits, logits)


def test_observers_stay_with_their_site() -> None:
    model, batch = neuron_model(), batches(1)[0]
    with usage(model) as meter:
        widen_unsure(model, {site: torch.full((2,), 2.0) for site in SITES}, 12)
        model(**batch)
        retrieve_plainly(model)
        model(**batch)
    assert int(meter[SITES[0]].counts.sum()) == 30 * 2 * (12 + 4)
    assert not any(mixture.router.observers for mixture in model.mixtures.values())


def test_a_missing_threshold_is_named() -> None:
    with pytest.raises(ValueError, match=f"no thresholds for {SITES[0]}"):
        flag_unsure(neuron_model(), {})


def test_coverages_are_one_row_for_each_real_token() -> None:
    model = neuron_model()
    assert {site: rows.shape for site, rows in coverages(model, batches(2)).items()} == dict.fromkeys(SITES, (60, 2))


def test_usage_is_kept_with_a_model_and_goes_on() -> None:
    model, batch = neuron_model(), batches(1)[0]
    keep_usage(model)
    model(**batch)
    counts = {site: rows.clone() for site, rows in kept_usage(model).items()}
    assert {site: int(rows.sum()) for site, rows in counts.items()} == dict.fromkeys(SITES, 240)
    other = neuron_model()
    other.whole.update({name: t.clone() for name, t in model.whole.items()})
    assert all(f"whole.usage.{site}.rows" in other.added_state() for site in SITES)
    meter = keep_usage(other)
    other(**batch)
    assert all(torch.equal(kept_usage(other)[site], 2 * counts[site]) for site in SITES)
    meter.detach()
    forget_usage(other)
    assert not kept_usage(other) and not other.whole
    other.whole[f"usage.{SITES[0]}.rows"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shape \(3,\), this model needs \(48,\)"):
        keep_usage(other)
