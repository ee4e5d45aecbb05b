"""The synthetic part of TensorPoly's results section, from the JSON of the skills suite.

python -m benchmarks.skills_tables
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixwright.evaluation.table import markdown

Results = Mapping[str, Any]
PRIVATE = "LoRA, one per task"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def below(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """On how many seeds ours is the smaller error, and the mean of the relative difference."""
    wins = sum(a < b for a, b in zip(ours, theirs, strict=True))
    change = statistics.mean(a / b - 1 for a, b in zip(ours, theirs, strict=True))
    return f"{wins} of {len(ours)} ({change:+.0%})"


def shape(settings: Mapping[str, Any]) -> str:
    """What distinguishes a member, in the paper's letters."""
    letters = {"rank": "r", "num_latent": "R", "order": "N", "groups": "G", "heads": "H"}
    default = {} if settings["experts"] in ("lora", "poly", "mhr") else {"rank": 16, "order": 2}
    default |= {"num_latent": 8} if settings["experts"] in ("poly", "mhr") and not settings["private"] else {}
    given = {**default, **settings}
    return " ".join(f"{letter}={given[name]}" for name, letter in letters.items() if name in given)


def held_in(exam: Results) -> str:
    """Sizes, the chosen rate, the error on the training tasks, and the routing."""
    rows: list[list[str]] = []
    for name, one in exam.items():
        sizes = one["numbers"]
        worse = "-"
        if PRIVATE in exam and name != PRIVATE:
            pairs = zip(sum(one["by_task"], []), sum(exam[PRIVATE]["by_task"], []), strict=True)
            found = [ours > private for ours, private in pairs]
            worse = f"{sum(found)} / {len(found)}"
        routing = [row for row in one["routing"] if row]
        shown = [f"{statistics.mean(row[key] for row in routing):.2f}" for key in routing[0]] if routing else ["-"] * 3
        shown = ["-"] * 3 if one["settings"]["private"] or one["settings"]["experts"] == "tlora" else shown
        rows.append(
            [name, shape(one["settings"]), str(sizes["stored"]), str(sizes["router_per_task"])]
            + [str(sizes["merged_rank"]), f"{one['learning_rate']:g}", spread(one["held_in"]), worse, *shown]
        )
    head = ["system", "shape", "stored", "Z per task", "merged rank", "rate", "error, training tasks"]
    return markdown([*head, "tasks worse than private", "entropy", "usage", "peak"], rows)


def few_shot(exam: Results) -> str:
    """A row for everything that may be trained."""
    rows: list[list[str]] = []
    for name, one in exam.items():
        found = one.get("few_shot", {})
        for what in dict.fromkeys(key.split("/")[0] for key in found):
            shots = [key for key in found if key.split("/")[0] == what]
            trained = one["numbers"]["transfer_z" if what == "z" else "transfer_all"]
            trained -= one["numbers"]["router_per_task"] if what == "mu" else 0
            rows.append([name, what, str(trained), *(spread(found[key]["error"]) for key in shots)])
    head = [f"{key.split('/')[1]} shots" for key in next(one for one in exam.values() if "few_shot" in one)["few_shot"]]
    return markdown(["system", "trains", "trained", *dict.fromkeys(head)], rows)


def separability(results: Results) -> str:
    """The same systems on skills whose columns are sums of 1, 3 or 12 tensor products."""
    exams = {"separable": "1", "between": "3", "plain": "12 (any column)"}
    names = [name for name in results["plain"] if any(name in results[exam] for exam in ("separable", "between"))]
    rows = [
        [name, *(spread(results[exam][name]["held_in"]) if name in results[exam] else "-" for exam in exams)]
        for name in names
    ]
    return markdown(["system", *exams.values()], rows)


def one_rate(results: Results) -> str:
    """One learning rate for everything, chosen from the grid, against 0.1 for Z."""
    rows: list[list[str]] = []
    for name, one in results["one learning rate"].items():
        for label, found in (("two", results["plain"][name]), ("one", one)):
            numbers = [statistics.mean(row[key] for row in found["routing"]) for key in ("entropy", "usage", "peak")]
            rate = f"{found['learning_rate']:g}"
            rows.append([name, label, rate, spread(found["held_in"]), *(f"{value:.2f}" for value in numbers)])
    return markdown(["system", "rates", "of the experts", "error", "entropy", "usage", "peak"], rows)


def claims(results: Results) -> str:
    """Orderings, and on how many seeds they hold."""
    rows: list[list[str]] = []

    def add(text: str, exam: str, ours: str, theirs: str) -> None:
        found = results[exam]
        rows.append([text, exam, below(found[ours]["held_in"], found[theirs]["held_in"])])

    for exam, lora, poly, smaller, larger in (
        ("calibration", "LoRA r=16", "Poly r=4", "entangled G=2", "entangled G=4"),
        ("plain", "LoRA, shared", "Poly r=4", "entangled G=2", "entangled G=3"),
    ):
        add("(1) TensorPoly-I below TLoRA, equal size", exam, "TensorPoly-I", "TLoRA")
        add("(1) TensorPoly-I below LoRA, equal size", exam, "TensorPoly-I", lora)
        add("(1) Poly of twice the size below TensorPoly-I", exam, poly, "TensorPoly-I")
        add("(2) TensorPoly-I below TensorPoly-II", exam, "TensorPoly-I", "TensorPoly-II")
        add(f"(2) {smaller} below TensorPoly-II", exam, smaller, "TensorPoly-II")
        add(f"(2) {larger} below {smaller}", exam, larger, smaller)
    for ours, theirs in (
        ("Poly", "LoRA, shared"), ("MHR", "LoRA, shared"), ("Poly", "TensorPoly-I"),
        ("TensorPoly-I", "TensorPoly-I N=4"), ("entangled G=3", "entangled N=4 G=5"),
        ("TensorPoly-I, released", "TensorPoly-I"), ("TensorPoly-II, released", "TensorPoly-II"),
        ("entangled G=3", "TensorPoly-I"), ("entangled G=4", "TensorPoly-I R=12"),
        ("TensorPoly-I R=12", "Poly r=4"), ("entangled G=3", "LoRA, shared"),
    ):  # fmt: skip
        add(f"{ours} below {theirs}", "plain", ours, theirs)
    for exam in ("between", "separable"):
        for ours, theirs in (("TensorPoly-I", "TensorPoly-II"), ("entangled G=3", "TensorPoly-II"),
                             ("entangled G=2", "TensorPoly-I"), ("TensorPoly-I", "Poly"),
                             ("TensorPoly-II", "Poly")):  # fmt: skip
            add(f"{ours} below {theirs}", exam, ours, theirs)
    return markdown(["ordering", "skills", "seeds (mean relative difference)"], rows)


def router_only(exam: Results) -> str:
    """Where training a row of Z alone beats training everything."""
    rows: list[list[str]] = []
    for name, one in exam.items():
        found = one.get("few_shot", {})
        shots = [key.split("/")[1] for key in found if key.startswith("z/")]
        if shots:
            cells = [below(found[f"z/{count}"]["error"], found[f"all/{count}"]["error"]) for count in shots]
            rows.append([name, *cells])
            head = [f"{count} shots" for count in shots]
    return markdown(["z below all, seeds", *head], rows)


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("benchmarks/results/skills_suite.json"))
    result = json.loads(parser.parse_args().file.read_text())
    results = result["results"]
    print(f"`{result['command']}`, {result['machine']['processor']}, one thread, {result['versions']}, "
          f"{result['cpu_seconds'] / 60:.0f} CPU-minutes\n")  # fmt: skip
    for title, text in (
        ("Plain low-rank skills", held_in(results["plain"])),
        ("New compositions from few shots", few_shot(results["plain"])),
        ("Router alone against everything", router_only(results["plain"])),
        ("Training compositions that come back", few_shot(results["seen compositions"])),
        ("Router alone against everything, compositions that come back", router_only(results["seen compositions"])),
        ("Separability of the skills", separability(results)),
        ("Separable skills", held_in(results["separable"])),
        ("One learning rate or two", one_rate(results)),
        ("Orderings", claims(results)),
        ("The sheet's pilot", held_in(results["calibration"])),
    ):
        print(f"#### {title}\n\n{text}\n")
    gaps = [
        gap for exam in results.values() for one in exam.values() if isinstance(one, dict) for gap in one["merged_gap"]
    ]
    stuck = results["all_zero"]
    print(f"Merged weights against the layer: at most {max(gaps):.0e} of the largest output (the file has five "
          f"digits), {len(gaps)} models.")  # fmt: skip
    print(f"B's leaves all zero: largest change of any leaf {stuck['largest_change_of_a_leaf']:g}, errors "
          f"{', '.join(f'{error:.3f}' for error in stuck['held_in'])}.")  # fmt: skip


if __name__ == "__main__":
    main()
