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


def matrix(results: dict[str, Any], metric: str) -> str:
    """All exams in one table: the mean, and the paired difference to PHATGOOSE with half its 95 % interval.

    A difference whose interval contains zero is shown as `=`.
    """
    exams = list(results)
    rows: list[list[str]] = []
    first = results[exams[0]]["systems"]
    for name in sorted((n for n in first if n not in singles(first)), key=_rank(results, metric), reverse=True):
        cells = [_cell(results[exam]["systems"].get(name), metric, name) for exam in exams]
        rows.append([f"**{name}**" if name == REFERENCE else name, *cells])
    return markdown(["system", *exams], rows)


def _rank(results: dict[str, Any], metric: str) -> Any:
    def mean(name: str) -> float:
        found = [kept["systems"][name][metric]["mean"] for kept in results.values() if name in kept["systems"]]
        return sum(found) / len(found)

    return mean


def _cell(found: dict[str, Any] | None, metric: str, name: str) -> str:
    if found is None:
        return "-"
    gap, low, high = found[metric]["minus_phatgoose"]
    mean = f"{found[metric]['mean']:.3f}"
    if name == REFERENCE:
        return mean
    return f"{mean} (=)" if low <= 0.0 <= high else f"{mean} ({gap:+.3f} ± {(high - low) / 2:.3f})"


def singles(systems: dict[str, Any]) -> set[str]:
    """Rows of single experts, which the rows of the best ones stand for."""
    names = list(systems)
    first = names.index("backbone") + 1
    return set(names[first : names.index("merged product")]) - {BEST_SINGLE, ORACLE}


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=[])
    parser.add_argument("--matrix", action="store_true", help="one table for a file, instead of one for each exam")
    args = parser.parse_args()
    files = args.files or [Path(f"benchmarks/results/{name}.json") for name in ("synthetic_suites", "text_suite")]
    for file in files:
        result = json.loads(file.read_text())
        print(f"`{result['command']}`, {result['machine']['processor']}, one thread, {result['versions']}\n")
        if args.matrix:
            metric = (
                "tokens" if "tokens" in next(iter(result["results"].values()))["systems"][REFERENCE] else "accuracy"
            )
            print(matrix(result["results"], metric), "\n")
            continue
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
