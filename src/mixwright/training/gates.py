"""Gates between stages: a measured number against a bound, written down whatever it says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition on what a stage left. `passed` None: it could not be measured, which is no pass."""

    name: str
    passed: bool | None
    said: str
    """The condition with its numbers, in a sentence."""
    measured: float | None = None
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was measured of a trained composition: plain data for the record, and gates."""

    record: Mapping[str, Any] = field(default_factory=dict[str, Any])
    gates: tuple[Gate, ...] = ()
    sentences: tuple[str, ...] = ()
    """What is to be said beside the gates."""

    def failed(self) -> tuple[Gate, ...]:
        """Gates that were not passed."""
        return tuple(gate for gate in self.gates if not gate.passed)

    def said(self) -> str:
        """One line for each sentence, and for each gate."""
        return "\n".join((*self.sentences, *(f"{_WORDS[gate.passed]}: {gate.said}" for gate in self.gates)))

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        gates = [asdict(gate) for gate in self.gates]
        return {"gates": gates, "findings": dict(self.record), "sentences": list(self.sentences)}


def read_findings(record: Mapping[str, Any]) -> Findings:
    """What `plain` wrote; empty for a record without gates."""
    return Findings(
        record=record.get("findings", {}),
        gates=tuple(Gate(**gate) for gate in record.get("gates", ())),
        sentences=tuple(record.get("sentences", ())),
    )


_WORDS = {True: "gate passed", False: "gate NOT passed", None: "gate not measured"}
