import pytest
import torch

from mixwright.evaluation import systems
from mixwright.evaluation.quality import gate_diagnostics, measure_quality, redundancy, update_cosine, verdict
from mixwright.evaluation.routing_stats import agreement, contributions, leave_one_out, load, site_stats
from mixwright.evaluation.scores import TokenTask
from mixwright.routing import Routing

from .conftest import batches


def test_cosine_of_updates_equals_that_of_the_explicit_matrices(model):
    factors = systems.factors(model)
    one, other = ({site: rows[at] for site, rows in factors.items()} for at in (0, 1))
    flat = [torch.cat([(s * up @ down).double().reshape(-1) for down, up, s in pool.values()]) for pool in (one, other)]
    expected = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert update_cosine(one, other) == pytest.approx(float(expected), abs=1e-6)
    assert update_cosine(one, one) == pytest.approx(1.0)
    assert update_cosine(one, {}) == 0.0


def test_redundancy_names_the_copy(model):
    each = systems.factors(model)
    pool = {name: {site: rows[at] for site, rows in each.items()} for at, name in enumerate(model.experts)}
    pool["copy"] = pool["expert0"]
    found = redundancy("expert0", pool, {"expert0": {"s": torch.ones(3)}, "copy": {"s": torch.ones(3)}})
    assert found["nearest"] == "copy" and found["experts"]["copy"]["gate"] == pytest.approx(1.0)
    assert found["experts"]["expert1"]["gate"] is None


def test_dead_gates_are_found():
    found = gate_diagnostics({"alive": torch.tensor([1.0, -1.0]), "dead": torch.full((2,), 0.5)})
    assert found["dead"] == ["dead"] and found["sites"] == 2 and found["std"] == pytest.approx(0.5)


def test_quality_of_a_random_expert_is_a_plain_dict_with_a_verdict(model, kind):
    own, general = (TokenTask(name, batches(kind, at, 24)) for at, name in enumerate(("own", "general")))
    gates = {name: {site: torch.randn(8) for site in model.mixtures} for name in model.experts}
    found = measure_quality(model, "expert2", held_out=own, general=general, gates=gates)
    import json

    json.dumps(found)
    assert found["gain"]["low"] <= found["gain"]["value"] <= found["gain"]["high"] and found["gain"]["n"] == 24
    assert found["harm"]["low"] <= found["harm"]["value"] <= found["harm"]["high"]
    assert found["verdict"]["status"] in {"good", "doubtful", "bad"}


def test_verdicts():
    good = {"gain": {"low": 0.1, "high": 0.3}, "redundancy": {"nearest": None, "experts": {}}}
    assert verdict(good) == {"status": "good", "reasons": []}
    assert verdict({**good, "gain": {"low": -0.1, "high": 0.3}})["status"] == "doubtful"
    assert verdict({**good, "gain": {"low": -0.3, "high": -0.1}})["status"] == "bad"
    assert verdict({**good, "harm": {"low": 0.2, "value": 0.3}})["status"] == "doubtful"
    twin = {"nearest": "x", "experts": {"x": {"update": 0.95}}}
    assert "nearly the same update as x" in verdict({**good, "redundancy": twin})["reasons"]


def test_statistics_of_a_routing_by_hand():
    routing = Routing(torch.tensor([[[0.75, 0.25], [1.0, 0.0]]]), 3, torch.tensor([[[2, 0], [1, 1]]]))
    found = site_stats([routing])
    torch.testing.assert_close(found.load, torch.tensor([0.125, 0.5, 0.375]))
    assert found.margin == pytest.approx((0.5 + 1.0) / 2) and found.tokens == 2
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()) / 2
    assert found.entropy == pytest.approx(float(entropy), abs=1e-6)
    masked = site_stats([routing], torch.tensor([[True, False]]))
    assert masked.tokens == 1 and masked.load.tolist() == [0.25, 0.0, 0.75]


def test_agreement_is_one_for_equal_leaders_and_counts_pairs():
    def one(*ids):
        return [Routing(torch.ones(1, len(ids), 1), 3, torch.tensor([[[i] for i in ids]]))]

    assert agreement({"a": one(0, 1), "b": one(0, 1)}) == 1.0
    assert agreement({"a": one(0, 1), "b": one(0, 2)}) == 0.5


def test_contributions_match_the_definition_at_one_site(model, kind):
    (batch,) = batches(kind, 0, 4)
    found = contributions(model, batch)
    assert set(found) == set(model.mixtures) and all((ratio >= 0).all() for ratio in found.values())
    assert sum(float(ratio.sum()) for ratio in found.values()) > 0.0
    with torch.no_grad(), model.trace() as trace, model.only("expert1"):
        assert load(trace) == {}
        alone = contributions(model, batch)
    for ratio in alone.values():
        assert ratio[0] == 0.0 and ratio[2] == 0.0 and ratio[1] > 0.0


def test_leaving_an_expert_out_equals_a_pool_without_it(model, kind):
    task = TokenTask("t", batches(kind, 0, 6))
    before = {site: mixture.router.allowed.clone() for site, mixture in model.mixtures.items()}
    lost = leave_one_out(model, [task])
    assert set(lost) == set(model.experts) and any(abs(value) > 1e-6 for value in lost.values())
    assert all(torch.equal(mixture.router.allowed, before[site]) for site, mixture in model.mixtures.items())
