"""A found hybrid explained in numbers: what it is made of, what each part of it is worth, and what was not measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.composition.model import ComposedModel
from mixwright.evaluation.explain import described
from mixwright.evaluation.hybrid_boundaries import Boundary, boundaries
from mixwright.evaluation.hybrid_cost import cost_lines, offered
from mixwright.evaluation.hybrid_counterfactuals import (
    HYBRID,
    Counterfactual,
    LeftOut,
    Meter,
    alone,
    counterfactuals,
    leave_one_out,
)
from mixwright.evaluation.hybrid_documents import Documents
from mixwright.evaluation.hybrid_rows import Row, mixes_models, rows_of
from mixwright.evaluation.hybrid_slices import Slice, slices
from mixwright.evaluation.hybrid_sweep import Flatness, Grid, Sweep, flatness, grid, sweep
from mixwright.evaluation.hybrid_trajectories import Trajectory, trajectories
from mixwright.evaluation.verdict import Verdict, verdict

BUDGET = "the weights they have here"
"""What a component and the hybrid have in common when each is measured as it stands: not the training."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One pretrained model: `layers` in each slot of the hybrid (empty at embedding and head), and its size."""

    name: str
    architecture: str
    width: int
    layers: list[str]
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One system on all documents. `against`: what the hybrid is beside it, paired (of the hybrid itself: None)."""

    system: str
    loss: float
    is_component: bool
    against: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What was measured on. `cut`: files of one text, whose pieces were taken for documents."""

    files: list[str]
    documents: int
    tokens: int
    cut: list[str]


@dataclass(frozen=True, kw_only=True)
class HybridExplanation:
    """A hybrid in plain lists. What was not measured is None or empty, and named in `missing`, with how to get it.

    `rows`: the mixture weights in force, None for a model that was never run. `systems`: the hybrid first.
    """

    components: list[Component]
    slots: list[str]
    rows: list[Row]
    texts: Texts | None = None
    systems: list[Measured] = field(default_factory=list[Measured])
    slices: list[Slice] = field(default_factory=list[Slice])
    counterfactuals: list[Counterfactual] = field(default_factory=list[Counterfactual])
    left_out: list[LeftOut] = field(default_factory=list[LeftOut])
    boundaries: list[Boundary] = field(default_factory=list[Boundary])
    sweeps: list[Sweep] = field(default_factory=list[Sweep])
    grid: Grid | None = None
    flatness: Flatness | None = None
    trajectories: list[Trajectory] = field(default_factory=list[Trajectory])
    cost: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    licences: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    obligations: list[str] = field(default_factory=list[str])
    verdicts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    missing: list[str] = field(default_factory=list[str])
    composition: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def best(self) -> Measured | None:
        """The component with the least loss by itself, chosen on these very texts."""
        return min((s for s in self.systems if s.is_component), key=lambda s: s.loss, default=None)

    def system(self, name: str) -> Measured | None:
        """A system by its name."""
        return next((s for s in self.systems if s.system == name), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain dictionaries and lists, for JSON."""
        return asdict(self)


def explain_hybrid(
    model: ComposedModel,
    documents: Documents | None = None,
    *,
    runs: Sequence[str | Path] = (),
    sweeps: bool = True,
    cost: Sequence[tuple[str, str, str]] = (),
    licences: Sequence[Mapping[str, Any]] = (),
    obligations: Sequence[str] = (),
    verdicts: Sequence[Mapping[str, Any]] = (),
    progress: Callable[[str], None] | None = None,
) -> HybridExplanation:
    """Measure what can be measured with what is given: texts for losses, folders of runs for trajectories.

    `sweeps`: also the loss around the choice, and its curvature: the longest part. `cost` (what, how much, remark)
    stands in place of what is counted here and of what the model says of itself. `licences` are shown as they are
    given; so are `verdicts`, comparisons that were made elsewhere, at equal tokens or FLOPs, as `Verdict.as_json`
    writes them. The model is left as it was. Raises ValueError for a model whose experts are not parts of whole models,
    and what `trajectories` raises.
    """
    if not mixes_models(model):
        raise ValueError("this model is no hybrid of whole models, whose experts are embeddings, runs and heads.")
    rows = rows_of(model, _first(model, documents))
    paths = trajectories(runs, list(model.mixtures), list(model.experts)) if runs else []
    found: dict[str, Any] = {} if documents is None else _measured(model, documents, rows, progress, sweeps=sweeps)
    missing = _missing(model, documents, rows, runs, licences, verdicts, sweeps=sweeps)
    return HybridExplanation(
        components=_components(model),
        slots=list(model.mixtures),
        rows=rows,
        trajectories=paths,
        cost=[*(cost or cost_lines(model, rows, documents))],
        licences=[dict(one) for one in licences],
        obligations=[*obligations],
        verdicts=[dict(one) for one in verdicts],
        missing=missing,
        composition=described(model),
        **found,
    )


def _first(model: ComposedModel, documents: Documents | None) -> dict[str, Tensor]:
    """Inputs of one pass: of the first documents, or of one token, where weights that follow the text are not asked."""
    device = next(model.backbone.parameters()).device
    if documents is not None:
        return dict(documents.batches[0].to(device).inputs)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _measured(
    model: ComposedModel,
    documents: Documents,
    rows: Sequence[Row],
    progress: Callable[[str], None] | None,
    *,
    sweeps: bool,
) -> dict[str, Any]:
    meter = Meter(model, documents, progress)
    systems = meter.systems()
    worth = counterfactuals(meter, {row.name: row.weights for row in rows})
    found: dict[str, Any] = {
        "texts": Texts(
            files=list(dict.fromkeys(documents.files)),
            documents=len(documents),
            tokens=int(documents.tokens.sum()),
            cut=list(documents.cut),
        ),
        "systems": [_system(meter, name, sums) for name, sums in systems.items()],
        "slices": slices(documents, systems),
        "counterfactuals": worth,
        "left_out": leave_one_out(meter),
        "boundaries": boundaries(model, documents),
    }
    if sweeps and len(model.experts) > 1:
        found["sweeps"] = [sweep(meter, row, 0 if len(model.experts) == 2 else row.leader) for row in rows]
        if len(rows) > 1 and len(model.experts) == 2:
            found["grid"] = grid(meter, _two(rows, worth), 0)
        found["flatness"] = flatness(model, documents)
    return found


def _system(meter: Meter, name: str, sums: Tensor) -> Measured:
    names = {alone(component) for component in meter.model.experts}
    tokens = meter.tokens.sum(-1)
    ours, theirs = (found.sum(-1) / tokens for found in (meter.hybrid(), sums))
    against = None if name == HYBRID else verdict(ours, theirs, rival=name, budget=BUDGET, tokens=tokens)
    return Measured(system=name, loss=meter.loss(sums), is_component=name in names, against=against)


def _two(rows: Sequence[Row], worth: Sequence[Counterfactual]) -> tuple[Row, Row]:
    """The two rows whose weights move the loss most when forced, in the order of a pass."""
    effect = {row.name: max(abs(c.change.value) for c in worth if c.row == row.name) for row in rows}
    first, second = sorted(sorted(rows, key=lambda row: -effect[row.name])[:2], key=lambda row: rows.index(row))
    return first, second


def _components(model: ComposedModel) -> list[Component]:
    backbone: Any = model.backbone
    runs: Any = getattr(backbone, "runs", None)
    found: list[Component] = []
    for m, name in enumerate(model.experts):
        component: nn.Module = backbone.components[m]
        layers = [_layers(run) for run in runs[m]] if runs else ["" for _ in range(backbone.num_blocks)]
        found.append(
            Component(
                name=name,
                architecture=type(component).__name__,
                width=int(backbone.widths[m]),
                layers=["", *layers, ""],
                parameters=sum(p.numel() for p in component.parameters()),
            )
        )
    return found


def _layers(run: Sequence[int]) -> str:
    """`layers 0-3`, counted as the component counts them."""
    numbers = list(run)
    if not numbers:
        return "no layer"
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}\u2013{numbers[-1]}"


def _missing(
    model: ComposedModel,
    documents: Documents | None,
    rows: Sequence[Row],
    runs: Sequence[Any],
    licences: Sequence[Any],
    verdicts: Sequence[Any],
    *,
    sweeps: bool,
) -> list[str]:
    """What the page can't say, with the reason, in sentences."""
    said: list[str] = []
    if documents is None:
        said.append(
            "No loss of anything: no texts were given (--data FILE). Without them nothing here says what a weight is "
            "worth, or whether the hybrid is any better than one of its components."
        )
    else:
        if not verdicts:
            said.append(
                "Components trained on as many tokens, or with as many FLOPs, as the hybrid: each was measured as it "
                "stands inside the hybrid. Where training changed it there, it is not what it would be if it had been "
                "trained alone (--verdicts FILE adds comparisons that were made elsewhere)."
            )
        if documents.cut:
            said.append(
                f"Intervals over documents for {', '.join(documents.cut)}: a file of one text; its pieces were taken "
                "for documents, so its intervals are narrower than they should be."
            )
    if len(model.experts) < 2:
        said.append("What a weight is worth: there is one component only, and its weight is 1 everywhere.")
    if not runs:
        said.append("How the weights moved in training: no runs were given (--runs FOLDER).")
    elif len(runs) == 1:
        said.append("How far another seed would lead: one run was given, so there is no band.")
    if documents is not None and not sweeps:
        said.append("The ground around the choice: sweeps were switched off (--no-sweep).")
    if any(row.spread is not None for row in rows):
        said.append("Sweeps of the router itself: a forced weight is the same for all tokens, the hybrid's is not.")
    if offered(model) is not None:
        said.append("Time and energy: nothing was timed here, and operations are no time. Peak memory is an estimate.")
    else:
        if documents is None:
            said.append("Operations of a pass: they are counted on texts, and none were given.")
        said.append("Time, memory and energy: nothing was timed here, and operations are no time.")
    if not licences:
        said.append("Licences: no ledger was at hand.")
    return said
