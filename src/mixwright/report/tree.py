"""A tree of things that are alike, drawn beside their names: the further right two branches meet, the less alike."""

from collections.abc import Sequence

from mixwright.evaluation.linkage import Merge
from mixwright.report.markup import escape, tag


def tree(merges: Sequence[Merge], names: Sequence[str], order: Sequence[int], title: str, ends: tuple[str, str]) -> str:
    """Rows of names (markup, by thing) in `order`, and the branches to their right, stretched to the room there is.

    `ends`: what the left and the right edge stand for.
    """
    rows = [tag("li", names[thing]) for thing in order]
    scale = tag("p", *(tag("span", escape(end)) for end in ends), class_="ends")
    drawn = tag("div", _branches(merges, order, title), scale)
    return tag("div", tag("ol", *rows), drawn, class_="tree", style=f"--rows:{len(rows)}")


def _branches(merges: Sequence[Merge], order: Sequence[int], title: str) -> str:
    count, most = len(order), max((merge.height for merge in merges), default=0.0)
    tips = {thing: (0.0, place + 0.5) for place, thing in enumerate(order)}
    drawn: list[str] = []
    for number, merge in enumerate(merges):
        x = 100 * merge.height / most if most > 0 else 100.0
        (left, top), (right, bottom) = tips.pop(merge.left), tips.pop(merge.right)
        drawn.append(f"M{left:.4g} {top:.6g}H{x:.4g}V{bottom:.6g}H{right:.4g}")
        tips[count + number] = (x, (top + bottom) / 2)
    lines = tag("path", d="".join(drawn), class_="branch", vector_effect="non-scaling-stroke")
    return tag(
        "svg",
        tag("title", escape(title)),
        lines,
        class_="branches",
        role="img",
        viewBox=f"0 0 100 {max(count, 1)}",
        preserveAspectRatio="none",
    )
