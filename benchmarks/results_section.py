"""The tables of the README's results section, from the JSON of the two suites.

python -m benchmarks.results_section
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import REFERENCE
from mixwright.evaluation.table import BEST_SINGLE, ORACLE, markdown


def table(systems: dict[str, Any], metric: str, drop: set[str]) -> str:
    """Best mean first: the mean with its interval, the paired difference to PHATGOOSE, the mean of each seed."""
    rows: list[list[str]] = []
    for name in sorted(systems, key=lambda n: systems[n][metric]["mean"], reverse=True):
        if name in drop:
            continue
        found = systems[name][metric]
        gap, low, high = found["minus_phatgoose"]
        difference = "reference" if name == REFERENCE else f"{gap:+.3f} ({low:+.3f} .. {high:+.3f})"
        seeds = " ".join(f"{value:.3f}" for value in found["by_seed"])
        rows.append(
            [
                f"**{name}**" if name == REFERENCE else name,
                f"{found['mean']:.3f} ({found['low']:.3f} .. {found['high']:.3f})",
                difference,
                seeds,
                *(f"{value:.3f}" for value in found["by_task"].values() if len(found["by_task"]) <= 4),
            ]
        )
    tasks = list(systems[REFERENCE][metric]["by_task"])
    shown = tasks if len(tasks) <= 4 else []
    return markdown(["system", f"{metric}, mean (95 %)", f"minus {REFERENCE} (95 %)", "each seed", *shown], rows)


def singles(systems: dict[str, Any]) -> set[str]:
    """Rows of single experts, which the rows of the best ones stand for."""
    names = list(systems)
    first = names.index("backbone") + 1
    return set(names[first : names.index("merged product")]) - {BEST_SINGLE, ORACLE}


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=[])
    files = parser.parse_args().files or [
        Path(f"benchmarks/results/{name}.json") for name in ("synthetic_suites", "text_suite")
    ]
    for file in files:
        result = json.loads(file.read_text())
        print(f"`{result['command']}`, {result['machine']['processor']}, one thread, {result['versions']}\n")
        for exam, kept in result["results"].items():
            metric = "tokens" if "tokens" in kept["systems"][REFERENCE] else "accuracy"
            count = kept["systems"][REFERENCE][metric]["n"]
            print(f"#### {exam} ({count} examples over all seeds)\n")
            print(table(kept["systems"], metric, singles(kept["systems"])), "\n")
            if "without_sst2" in kept:
                means = {n: round(v, 3) for n, v in kept["without_sst2"].items() if n not in singles(kept["systems"])}
                print("Mean without sst2:", ", ".join(f"{n} {v:.3f}" for n, v in means.items()), "\n")


if __name__ == "__main__":
    main()
