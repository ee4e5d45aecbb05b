"""What `peer_layer` measured, as tables and against its bars."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.peer_contenders import ADAGRAD, ADAMW, LAZY, OURS, PLAIN, THEIRS

Groups = Mapping[str, Mapping[str, Any]]


class Found(NamedTuple):
    """One ratio: of which grid and width, type, switch, and number of tokens."""

    side: int
    dim: int
    dtype: str
    switch: str
    tokens: int
    value: float


def ratios(groups: Groups, part: str, over: str, under: str) -> Iterator[Found]:
    """Medians of `over` divided by those of `under`, wherever both were measured."""
    for key, group in groups.items():
        side, dim, dtype, switch = _named(key)
        for tokens, times in group.get(part, {}).items():
            if over in times and under in times:
                yield Found(side, dim, dtype, switch, int(tokens), times[over][0] / times[under][0])


def verdict(groups: Groups) -> dict[str, Any]:
    """Each bar, the worst case measured without torch's switch, and how many miss it."""
    bars: dict[str, Any] = {}

    def bar(name: str, least: float, found: Iterator[Found] | list[Found]) -> None:
        cases = [one for one in found if one.switch == "off"]
        if cases:
            worst = min(cases, key=lambda one: one.value)
            missed = sum(one.value < least for one in cases)
            bars[name] = {
                "at_least": least, "worst": round(worst.value, 2), "at": _place(worst), "missed": missed,
                "cases": len(cases),
            }  # fmt: skip

    whole = list(ratios(groups, "forward", THEIRS, OURS))
    bar("forward, 256 and 2048 tokens", 2.5, [one for one in whole if one.tokens > 1])
    bar("forward, 1 token", 1.0, [one for one in whole if one.tokens == 1])
    for name in (LAZY, ADAGRAD):
        steps = list(ratios(groups, "step", f"{THEIRS}, {ADAMW}", f"{OURS}, {name}"))
        bar(f"step, {name}", 4.0, steps)
        few = [one for one in steps if one.tokens <= 256]
        bar(f"step, {name}, 512^2 and up, up to 256 tokens", 6.0, [one for one in few if one.side >= 512])
        bar(f"step, {name}, 1024^2, up to 256 tokens", 10.0, [one for one in few if one.side >= 1024])
    near = ratios(groups, "forward", "limit", "experts")
    bar("limit / experts, 512^2 of 1024", 1 / 1.6, [one for one in near if (one.side, one.dim) == (512, 1024)])
    bar("plain torch, forward", 1.0, ratios(groups, "forward", THEIRS, PLAIN))
    bar("plain torch, step", 1.0, ratios(groups, "step", f"{THEIRS}, {ADAMW}", f"{PLAIN}, {LAZY}"))
    held = [
        Found(*_named(key), int(tokens), 5.0 / max(0.01, extra[OURS]))
        for key, group in groups.items()
        for tokens, extra in group.get("extra_mb", {}).items()
    ]
    bar("5 MB / extra memory in forward", 1.0, held)
    return bars


def report(groups: Groups) -> str:
    """Markdown: ratios by grid, width and tokens; milliseconds of the phases; the bars."""
    return "\n\n".join(
        filter(None, (_ratios(groups), _phases(groups), _memory(groups), _left_out(groups), _bars(groups)))
    )


_SHOWN = (
    ("forward", THEIRS, OURS, "forward"),
    ("forward", THEIRS, PLAIN, "forward, plain torch"),
    ("step", f"{THEIRS}, {ADAMW}", f"{OURS}, {LAZY}", f"step, {LAZY}"),
    ("step", f"{THEIRS}, {ADAMW}", f"{OURS}, {ADAGRAD}", f"step, {ADAGRAD}"),
    ("step", f"{THEIRS}, {ADAMW}", f"{PLAIN}, {LAZY}", f"step, plain torch, {LAZY}"),
)


def _ratios(groups: Groups) -> str:
    lines = ["| PEER-pytorch / mixwright | experts, width | 1 token | 256 | 2048 |", "| --- | --- | --- | --- | --- |"]
    for part, over, under, title in _SHOWN:
        for key in groups:
            found = {one.tokens: one.value for one in ratios({key: groups[key]}, part, over, under)}
            if found:
                cells = [f"{found[tokens]:.1f}x" if tokens in found else "-" for tokens in (1, 256, 2048)]
                lines.append(f"| {title} | {_title(key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _phases(groups: Groups) -> str:
    lines = [
        "| forward, ms | tokens | PEER-pytorch | mixwright | of it: route | experts alone | limit of the memory "
        "| experts / limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, group in groups.items():
        for tokens, times in group.get("forward", {}).items():
            names = (THEIRS, OURS, "route", "experts", "limit")
            cells = [f"{times[name][0]:.2f}" if name in times else "-" for name in names]
            cells.append(f"{times['experts'][0] / times['limit'][0]:.2f}")
            lines.append(f"| {_title(key)} | {tokens} | {' | '.join(cells)} |")
    lines += ["", "| step, ms | tokens | contender | median |", "| --- | --- | --- | --- |"]
    for key, group in groups.items():
        for tokens, times in group.get("step", {}).items():
            lines += [f"| {_title(key)} | {tokens} | {name} | {values[0]:.1f} |" for name, values in times.items()]
    return "\n".join(lines)


def _memory(groups: Groups) -> str:
    lines = ["| extra memory, MB | tokens | contender | forward | step |", "| --- | --- | --- | --- | --- |"]
    for key, group in groups.items():
        for part, place in (("extra_mb", 0), ("step_mb", 1)):
            for tokens, held in group.get(part, {}).items():
                for name, value in held.items():
                    cells = ["-", "-"]
                    cells[place] = f"{value:.1f}"
                    lines.append(f"| {_title(key)} | {tokens} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _left_out(groups: Groups) -> str:
    lines = [
        f"- {_title(key)}: {what}: {why}"
        for key, group in groups.items()
        for what, why in group.get("left_out", {}).items()
    ]
    lines += [f"- {_title(key)}: {group['failed']}" for key, group in groups.items() if "failed" in group]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def _bars(groups: Groups) -> str:
    lines = ["| bar | at least | worst | at | missed |", "| --- | --- | --- | --- | --- |"]
    for name, bar in verdict(groups).items():
        lines.append(
            f"| {name} | {bar['at_least']:.2f} | {bar['worst']:.2f} | {bar['at']} | {bar['missed']} of {bar['cases']} |"
        )
    return "\n".join(lines)


def _named(key: str) -> tuple[int, int, str, str]:
    size, dtype, *_, switch = key.replace(",", "").split()
    side, dim = size.split("x")
    return int(side), int(dim), dtype, switch


def _title(key: str) -> str:
    side, dim, dtype, switch = _named(key)
    return f"{side}^2 x {dim}, {dtype}" + (", torch on huge pages" if switch == "on" else "")


def _place(found: Found) -> str:
    return f"{found.side}^2 x {found.dim}, {found.dtype}, {found.tokens} tokens"
