"""Components of a hybrid read the same tokens: checked by their tokenizers, and mended only where that is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mixwright.backbones.hf import load_tokenizer, provenance
from mixwright.backbones.tokenizers import differences, fingerprint
from mixwright.backbones.vocabulary import vocabulary_of, with_vocabulary
from mixwright.errors import CatalogError, IncompatibleExpert
from mixwright.methods.manticore.config import ManticoreConfig

if TYPE_CHECKING:
    from mixwright.methods.manticore.model import HybridModel

_PADDING = 128
"""Rows of padding that models of one tokenizer may differ by: Pythia's 50,277 tokens have 50,304 rows, Mamba's 50,280,
and two sizes of Qwen2.5 are 128 apart."""


def of_one_vocabulary(
    config: ManticoreConfig, backbones: Sequence[nn.Module], names: Sequence[str], tokenizers: Sequence[Any] | None
) -> list[nn.Module]:
    """The components, those of another tokenizer than the first's with its vocabulary.

    `tokenizers`: of the components; None: those that lie beside them. Of a component without one only the size of its
    vocabulary is compared, give or take padding. Raises IncompatibleExpert (TOKENIZER) for others, unless
    `config.shared_vocabulary`.
    """
    known = [tokenizer_beside(each) for each in backbones] if tokenizers is None else list(tokenizers)
    if len(known) != len(backbones):
        raise ValueError(f"tokenizers: {len(known)} given for {len(backbones)} components.")
    components = list(backbones)
    for m, name in enumerate(names):
        found = _apart(backbones[0], backbones[m], known[0], known[m], config.vocab_size) if m else ""
        unseen = known[0] is None or known[m] is None
        if found and unseen and not config.shared_vocabulary:
            raise _refused(
                f"{found} of {names[0]!r}, more than padding explains, and no tokenizers to compare: give "
                "tokenizers=[...], or vocab_size, the number of tokens that they do share.",
                name,
            )
        if found and not config.shared_vocabulary:
            raise _refused(f"its tokenizer is not that of {names[0]!r}: {found}.", name)
        if found and unseen:
            raise _refused(
                f"{found}, and to share a vocabulary both tokenizers are needed: give tokenizers=[...].", name
            )
        if found:
            components[m] = with_vocabulary(backbones[m], known[m], known[0], name)
    return components


def new_tables(model: "HybridModel") -> tuple[str, ...]:
    """The parameters that a shared vocabulary made new, and that *align* has to train: embeddings and heads."""
    parameters = {id(value): name for name, value in model.named_parameters()}
    found: dict[str, None] = {}
    for component in model.components:
        if vocabulary_of(component) is not None:
            parts: tuple[Any, Any] = (component.get_input_embeddings(), component.get_output_embeddings())  # type: ignore[operator]
            found |= {parameters[id(value)]: None for part in parts for value in part.parameters()}
    return tuple(found)


def _apart(first: nn.Module, other: nn.Module, shared: Any, own: Any, said: int | None) -> str:
    """In what two components do not read the same tokens; empty where they do. `said`: how many they share, where the
    config says so."""
    mark = vocabulary_of(other)
    if mark is not None and (shared is None or mark in (fingerprint(shared), vocabulary_of(first))):
        return ""
    if shared is not None and own is not None:
        return "; ".join(differences(shared, own))
    sizes = _rows(first), _rows(other)
    alike = abs(sizes[0] - sizes[1]) <= _PADDING or (said is not None and said <= min(sizes))
    return "" if alike else f"{sizes[1]} rows of its embedding against {sizes[0]}"


def _rows(model: nn.Module) -> int:
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(table.weight.shape[0])


def tokenizer_beside(model: nn.Module) -> Any:
    """The tokenizer in the folder that a component came from; None where there is none."""
    known = provenance(model)
    path = known["path"]
    if not path or not (Path(path).is_dir() or known["revision"]):
        return None
    try:
        return load_tokenizer(path, revision=known["revision"])
    except CatalogError:
        return None


def _refused(reason: str, name: str) -> IncompatibleExpert:
    return IncompatibleExpert(
        "TOKENIZER",
        name,
        f"{reason} Give components of one tokenizer, or set shared_vocabulary: true: the first component's vocabulary "
        "becomes that of all, with new embeddings and heads for the others, which have to be aligned.",
    )
