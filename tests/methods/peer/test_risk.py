"""A layer that has learned knows which inputs it will do badly on."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mixwright.evaluation.neuron_usage import usage
from mixwright.evaluation.selective import coverages, risk_coverage
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.unsure import coverage_thresholds, flag_unsure
from mixwright.routing import Condition


def faint(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Twelve directions, seen clearly or faintly, in noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = 2 * torch.randn(12, 16, generator=torch.Generator().manual_seed(7))
    wanted = torch.randint(12, (count,), generator=generator)
    clear = torch.rand(count, 1, generator=generator)
    return clear * directions[wanted] + 0.5 * torch.randn(count, 16, generator=generator), wanted


def test_the_loss_of_the_surest_falls_and_what_is_flagged_is_worse() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(PEER(16, (12, 12), heads=2, top_k=4, dim_key=16), nn.Linear(16, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        x, wanted = faint(100 + step, 256)
        optimizer.zero_grad()
        cross_entropy(model(x), wanted).backward()
        optimizer.step()
    x, wanted = faint(1, 4096)
    model.eval()
    with torch.no_grad():
        losses = cross_entropy(model(x), wanted, reduction="none")
    found = risk_coverage(losses, coverages(model, [x])["0"].mean(-1), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    assert found.falls and found.risks[3] < 0.25 * found.risks[0]
    flag_unsure(model, coverage_thresholds(model, [faint(2, 4096)[0]], 0.2))
    router = model[0].router
    with usage(model) as meter:
        model(x)
    share = meter["0"].flagged
    assert share is not None and (share - 0.2).abs().max() < 0.03
    flagged = router.retrieve(x, Condition()).flagged.any(-1)
    assert losses[flagged].mean() > 3 * losses[~flagged].mean()
