"""Stage *inspect*: what can be known before anything is trained, so that nothing is found out after."""

from typing import Any

import torch

from mixwright.backbones.tokenizers import differences
from mixwright.backbones.vocabulary import vocabulary_of
from mixwright.composition.eval_mode import eval_mode
from mixwright.errors import CatalogError
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.cost import TOKENS, cost
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.programming import context_limit
from mixwright.methods.manticore.starting import pretrained_of
from mixwright.methods.manticore.vocabularies import tokenizer_beside
from mixwright.training.gates import Findings, Gate
from mixwright.training.job import Job


def inspect(model: HybridModel, job: Job, config: ManticoreConfig, quiet: bool) -> Findings:
    """Licences, sizes, tokenizers, context limits, cost, and that each component alone is itself inside the hybrid."""
    del quiet
    parts = [_described(model, number) for number in range(len(model.components))]
    licences, gate = _licences(model)
    expected = cost(model, min(job.recipe.data.max_length, TOKENS))
    return Findings(
        record={"components": parts, "licences": licences, "cost": expected.plain(job.recipe.data.max_length)},
        gates=(gate, _tokenizers(model, job, config), _context(model, job), _identity(model, job)),
        sentences=tuple(expected.text(job.recipe.data.max_length).splitlines()),
    )


def _described(model: HybridModel, number: int) -> dict[str, Any]:
    component, backbone = model.components[number], model.backbone
    return {
        "name": model.experts[number],
        "architecture": type(component).__name__,
        "layers": [len(run) for run in backbone.runs[number]],
        "width": backbone.widths[number],
        "parameters": sum(p.numel() for p in component.parameters()),
        "context_limit": context_limit(component),
    }


def _tokenizers(model: HybridModel, job: Job, config: ManticoreConfig) -> Gate:
    """Every component reads the tokens that the texts become. Others were refused when the hybrid was composed, where
    nothing asked for a shared vocabulary; what lies beside no component could not be compared."""
    beside = [tokenizer_beside(component) for component in pretrained_of(job.backbone)]
    apart = {name: differences(job.tokenizer, own) for name, own in zip(model.experts, beside) if own is not None}
    given = [name for name, part in zip(model.experts, model.components) if vocabulary_of(part) is not None]
    wrong = [name for name, found in apart.items() if found and name not in given]
    if wrong:
        return Gate(
            name="tokenizers", passed=False, said=f"{wrong[0]} reads other tokens: {'; '.join(apart[wrong[0]])}."
        )
    unknown = [name for name in model.experts if name not in apart and name not in given]
    if unknown:
        said = f"no tokenizer lies beside {', '.join(unknown)}; the sizes of their vocabularies go together."
        return Gate(name="tokenizers", passed=None, said=said)
    if given and config.shared_vocabulary:
        said = f"{', '.join(given)} came with another tokenizer and has the vocabulary of {model.experts[0]} now."
    else:
        said = "the components have one tokenizer, by vocabulary, merges and special tokens."
    return Gate(name="tokenizers", passed=True, said=said)


def _context(model: HybridModel, job: Job) -> Gate:
    limits = {name: context_limit(part) for name, part in zip(model.experts, model.components, strict=True)}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    length = job.recipe.data.max_length
    if not known:
        return Gate(name="context", passed=True, measured=length, said="no component says that its context ends.")
    least = min(known, key=lambda name: known[name])
    passed = length <= known[least]
    said = f"data.max_length {length} {'<=' if passed else '>'} {known[least]}, the context limit of {least}."
    return Gate(name="context", passed=passed, measured=length, bound=known[least], said=said)


@torch.no_grad()
def _identity(model: HybridModel, job: Job) -> Gate:
    """One-hot mixture weights give the component's own logits, to the bit."""
    assert job.data is not None
    device = next(model.parameters()).device
    inputs = job.data.collate(job.data.examples[:1]).to(device).inputs
    gaps: dict[str, float] = {}
    with eval_mode(model):
        for name, component in zip(model.experts, model.components, strict=True):
            with model.only(name):
                ours = model(**inputs, use_cache=False).logits
            theirs = component(**inputs, use_cache=False).logits[..., : ours.shape[-1]]
            gaps[name] = float((ours - theirs).abs().max())
    worst = max(gaps, key=lambda name: gaps[name])
    said = f"largest difference between {worst} alone in the hybrid and outside: {gaps[worst]:g}."
    return Gate(name="identity", passed=gaps[worst] == 0.0, measured=gaps[worst], bound=0.0, said=said)


def _licences(model: HybridModel) -> tuple[dict[str, Any] | None, Gate]:
    """The ledger, and whether every licence in it is known: without that nothing of this could be saved."""
    try:
        ledger = model.ledger()
    except CatalogError as error:
        return None, Gate(name="licences", passed=False, said=str(error))
    said = f"every licence is known: {ledger.expression.spdx}."
    if ledger.conflicts:
        return ledger.plain(), Gate(name="licences", passed=False, said=ledger.conflicts[0].why)
    return ledger.plain(), Gate(name="licences", passed=True, said=said)
