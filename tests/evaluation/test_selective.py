"""Risk-coverage by hand."""

import pytest
import torch

from mixwright.evaluation.selective import coverages, risk_coverage

from .neuron_layer import neuron_layer, tokens


def test_risks_are_means_over_the_surest() -> None:
    found = risk_coverage(
        torch.tensor([4.0, 1.0, 2.0, 9.0]), torch.tensor([0.2, 0.9, 0.8, 0.1]), (1.0, 0.75, 0.5, 0.25)
    )
    assert found.risks == pytest.approx((4.0, 7 / 3, 1.5, 1.0))
    assert found.falls and found.area == pytest.approx((4.0 + 7 / 3 + 1.5 + 1.0) / 4)
    against = risk_coverage(torch.tensor([4.0, 1.0]), torch.tensor([0.9, 0.1]), (1.0, 0.5))
    assert not against.falls
    with pytest.raises(ValueError, match="one for each token"):
        risk_coverage(torch.ones(3), torch.ones(2))


def test_coverages_of_real_tokens() -> None:
    peer = neuron_layer().train()
    x, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    found = coverages(peer, [x, {"x": x, "token_mask": mask}])
    assert peer.training and not peer.router.observers
    assert found["layer"].shape == (12 + 10, 2)
    assert (found["layer"] > 0).all() and (found["layer"] <= 1).all()
    torch.testing.assert_close(found["layer"][12:], found["layer"][:12][mask.flatten()])
