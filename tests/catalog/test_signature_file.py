"""A signature file: which statistics it may hold, and in which shapes."""

import pytest
import torch
from torch import Tensor

from mixwright.catalog.header import Header, TensorEntry
from mixwright.catalog.layout import SiteLayout
from mixwright.catalog.vectors import check_signatures
from mixwright.errors import CatalogError

ENTRY = TensorEntry("a", "F32", (2, 6), 0, 0)
SITES = {"layer.q": SiteLayout("layer.q", 2, 6, 5, 1.0, ENTRY, ENTRY)}
USUAL = {"mean": torch.zeros(6), "variance": torch.ones(6), "count": torch.tensor(3.0)}


def check(statistics: dict[str, Tensor]) -> None:
    entries = {
        f"layer.q/{name}": TensorEntry(f"layer.q/{name}", "F32", tuple(value.shape), 0, 0)
        for name, value in statistics.items()
    }
    check_signatures(Header(entries, 0), SITES, "signature.safetensors")


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_factor_of_any_rank_is_accepted(rank: int) -> None:
    check(USUAL)
    check(USUAL | {"factor": torch.zeros(rank, 6)})


@pytest.mark.parametrize(
    ("statistics", "code"),
    [
        (USUAL | {"factor": torch.zeros(6)}, "SHAPE"),
        (USUAL | {"factor": torch.zeros(0, 6)}, "SHAPE"),
        (USUAL | {"factor": torch.zeros(7, 6)}, "SHAPE"),
        (USUAL | {"factor": torch.zeros(3, 5)}, "SHAPE"),
        (USUAL | {"factor": torch.zeros(3, 6, 1)}, "SHAPE"),
        (USUAL | {"skewness": torch.zeros(6)}, "TENSOR"),
        ({"mean": torch.zeros(6), "factor": torch.zeros(2, 6)}, "INCOMPLETE"),
    ],
)
def test_others_are_refused(statistics: dict[str, Tensor], code: str) -> None:
    with pytest.raises(CatalogError) as refusal:
        check(statistics)
    assert refusal.value.code == code
