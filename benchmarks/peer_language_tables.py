"""The tables of PEER's language modelling section, from the JSON of the suite."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mixwright.evaluation.table import markdown

TEXTS = ("wikitext2", "library")


def perplexity(cells: Sequence[Mapping[str, Any]], text: str) -> str:
    """exp of the loss per token: mean and standard deviation over seeds."""
    values = [math.exp(cell["losses"][text]) for cell in cells]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def mean(cells: Sequence[Mapping[str, Any]], key: str, shown: str) -> str:
    return format(statistics.mean(cell[key] for cell in cells), shown) if key in cells[0] else "-"


def wins(cells: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> str:
    """On how many seeds the mean loss of both texts is the lower one."""
    pairs = zip(cells, others, strict=True)
    return f"{sum(sum(a['losses'].values()) < sum(b['losses'].values()) for a, b in pairs)} of {len(cells)}"


def tables(result: Mapping[str, Any]) -> str:
    """One row for each system: costs, perplexities, the dense layer's at equal operations, usage and unevenness."""
    dense = result["systems"]["dense"]["equal_steps"][0]["operations"]
    rows: list[list[str]] = []
    for name, row in result["systems"].items():
        cells, rivals = row["equal_steps"], row["dense_equal_flops"]
        rows.append(
            [name, f"{cells[0]['operations'] / dense:.2f}"]
            + [perplexity(cells, text) for text in TEXTS]
            + [perplexity(rivals, text) for text in TEXTS]
            + ["-" if name == "dense" else wins(cells, rivals)]
            + [mean(cells, "usage", ".1%"), mean(cells, "unevenness", ".2f")]
        )
    head = ["middle layer", "operations / dense", *TEXTS, *(f"dense, equal operations: {text}" for text in TEXTS)]
    return markdown([*head, "better on seeds", "usage", "unevenness"], rows)
