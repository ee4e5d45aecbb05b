"""A catalogue against a dictionary: any sequence of commands, reopened and crashed at will, agrees with it."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mixwright.catalog import shelf as shelf_module
from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.store import Catalog
from mixwright.errors import CatalogError

ids = st.sampled_from(["a", "b", "c.d", "e-1"])
points = st.sampled_from(["write_new", "publish_folder", "withdraw_folder"])
AFTER = {
    "disable": {"active": "disabled", "disabled": "disabled"},
    "enable": {"active": "active", "disabled": "active"},
    "retire": {"active": "retired", "disabled": "retired", "retired": "retired"},
    "restore": {"retired": "active", "active": "active"},
}


class Dead(BaseException):
    """The process ended here."""


class CatalogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        conftest = next(module for name, module in sys.modules.items() if name.endswith("catalog.conftest"))
        self.root = Path(tempfile.mkdtemp())
        self.sources = [conftest.Specimen(rank=1 + n, targets=("q_proj",)).write(self.root / f"s{n}") for n in range(2)]
        self.catalog = Catalog(self.root / "catalogue")
        self.model: dict[str, dict[str, Any]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(expert=ids, source=st.integers(0, 1))
    def add(self, expert: str, source: int) -> None:
        if expert in self.model:
            with pytest.raises(CatalogError, match="^EXISTS "):
                self.catalog.add(self.sources[source], expert_id=expert)
            return
        self.catalog.add(self.sources[source], expert_id=expert)
        self.model[expert] = {"state": "active", "rank": 1 + source, "quality": {}}

    @rule(expert=ids)
    def publish(self, expert: str) -> None:
        factors = {"layers.0.q_proj": LoraFactors(torch.ones(3, 8), torch.ones(8, 3), 0.5)}
        if expert in self.model and self.model[expert]["rank"] != 3:
            with pytest.raises(CatalogError, match="^EXISTS "):
                self.catalog.publish(expert, factors, peft_config={})
            return
        self.catalog.publish(expert, factors, peft_config={})
        self.model.setdefault(expert, {"state": "active", "rank": 3, "quality": {}})

    @rule(expert=ids, verb=st.sampled_from(sorted(AFTER)))
    def move(self, expert: str, verb: str) -> None:
        state = self.model.get(expert, {}).get("state")
        if state not in AFTER[verb]:
            with pytest.raises(CatalogError, match="^(MISSING|STATE) "):
                getattr(self.catalog, verb)(expert)
            return
        getattr(self.catalog, verb)(expert)
        self.model[expert]["state"] = AFTER[verb][state]

    @rule(expert=ids, gain=st.integers(0, 9))
    def attach(self, expert: str, gain: int) -> None:
        if expert not in self.model:
            with pytest.raises(CatalogError, match="^MISSING "):
                self.catalog.attach(expert, quality={"gain": gain})
            return
        self.catalog.attach(expert, quality={"gain": gain})
        self.model[expert]["quality"] = {"gain": gain}

    @rule(expert=ids)
    def remove(self, expert: str) -> None:
        if expert not in self.model:
            with pytest.raises(CatalogError, match="^MISSING "):
                self.catalog.remove(expert)
            return
        self.catalog.remove(expert)
        del self.model[expert]

    @rule()
    def reopen(self) -> None:
        self.catalog = Catalog(self.root / "catalogue")

    @rule(
        expert=ids, source=st.integers(0, 1), point=st.sampled_from(["write_new", "publish_folder", "withdraw_folder"])
    )
    def crash(self, expert: str, source: int, point: str) -> None:
        """Die at a step of a change, without any cleaning up; then another process comes."""
        with dying_at(point):
            try:
                if point == "withdraw_folder" and expert in self.model:
                    self.catalog.remove(expert)
                elif point != "withdraw_folder" and expert not in self.model:
                    self.catalog.add(self.sources[source], expert_id=expert)
            except Dead:
                pass
        if point == "withdraw_folder" and expert in self.model:
            del self.model[expert]  # it dies just after the one rename
        self.reopen()

    @invariant()
    def agrees(self) -> None:
        assert self.catalog.states() == {expert: self.model[expert]["state"] for expert in sorted(self.model)}
        active = sorted(expert for expert, known in self.model.items() if known["state"] == "active")
        assert list(self.catalog.ids()) == active
        for card in self.catalog.cards(active=False):
            assert (card.rank, card.quality) == (self.model[card.id]["rank"], self.model[card.id]["quality"])


@contextmanager
def dying_at(point: str) -> Iterator[None]:
    """The named step ends the process, before it happens or, for a removal, just after; nothing is tidied."""
    real, real_remove = getattr(shelf_module, point), shutil.rmtree

    def die(*arguments: Any) -> None:
        if point == "withdraw_folder":
            real(*arguments)
        raise Dead

    setattr(shelf_module, point, die)
    shelf_module.shutil.rmtree = lambda *_, **__: None  # type: ignore[assignment]
    try:
        yield
    finally:
        setattr(shelf_module, point, real)
        shelf_module.shutil.rmtree = real_remove  # type: ignore[assignment]


CatalogMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestCatalog = CatalogMachine.TestCase
