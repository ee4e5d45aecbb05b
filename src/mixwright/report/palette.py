"""A colour, an underline and a short label for each expert: colour alone is never the only sign."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

# Light and dark shade of each hue, told apart by eyes without red or green; each has 3:1 against its page.
HUES = (
    ("#0068b3", "#62b4f2"),
    ("#c04a00", "#ff9d63"),
    ("#00805c", "#45cc9f"),
    ("#a0337a", "#ea92c6"),
    ("#8a6500", "#e4c352"),
    ("#5a53b5", "#b3b0f7"),
    ("#0f7f96", "#7fdcf0"),
    ("#8c3030", "#e39a9a"),
)
NEUTRAL = ("#6b6b66", "#a5a59e")
LINES = ("solid", "dashed", "dotted", "double", "wavy")
PAGE = ("#fdfdfb", "#17181a")
INK = ("#1b1c1e", "#ececea")
_TINT = (0.20, 0.28)


@dataclass(frozen=True)
class Look:
    """How one expert is drawn: `colour` and `tint` are (light page, dark page); `line` is the underline's style."""

    label: str
    colour: tuple[str, str]
    tint: tuple[str, str]
    line: str


def looks(experts: Sequence[str], prominent: Iterable[str] = ()) -> dict[str, Look]:
    """A look for each expert. Small pools keep the pool's order, so that pages of one pool agree; in larger ones the
    `prominent` experts, in their order, get the colours that differ most."""
    order = list(experts) if len(experts) <= len(HUES) else list(dict.fromkeys([*prominent, *experts]))
    named = labels(experts)
    return {expert: _look(named[expert], place) for place, expert in enumerate(order)}


def neutral(label: str = "") -> Look:
    """The look of no expert at all."""
    return Look(label, NEUTRAL, (PAGE[0], PAGE[1]), "none")


def _look(label: str, place: int) -> Look:
    colour = HUES[place % len(HUES)]
    tint = tuple(mix(shade, page, share) for shade, page, share in zip(colour, PAGE, _TINT, strict=True))
    return Look(label, colour, (tint[0], tint[1]), LINES[(place // len(HUES) + place) % len(LINES)])


def labels(experts: Sequence[str]) -> dict[str, str]:
    """A label of two or three characters for each expert, from its name where possible: `licence` -> Li. A beginning of
    four letters or more that all names share is skipped: `expert-017` -> 017."""
    shared = len(commonprefix(list(experts))) if len(experts) > 1 else 0
    taken: dict[str, str] = {}
    for number, expert in enumerate(experts, start=1):
        tries = [*_tries(expert[shared:] if shared >= 4 else expert), *_tries(expert)]
        taken[expert] = next((label for label in tries if label not in taken.values()), f"#{number}")
    return taken


def _tries(name: str) -> list[str]:
    letters = [character for character in name if character.isascii() and character.isalnum()]
    pairs = [f"{letters[0]}{other}".capitalize() for other in letters[1:]] if letters else []
    return ["".join(letters), *pairs] if len(letters) == 3 and not letters[0].isalpha() else pairs


def palette_rules(styles: Mapping[str, Look]) -> str:
    """Style rules that give each expert's class its colours on light and on dark pages, and its underline."""
    light = "".join(f".{c}{{--c:{k.colour[0]};--t:{k.tint[0]};--u:{k.line}}}\n" for c, k in styles.items())
    dark = "".join(f".{c}{{--c:{k.colour[1]};--t:{k.tint[1]}}}\n" for c, k in styles.items())
    return f"{light}@media screen and (prefers-color-scheme:dark){{\n{dark}}}\n"


def mix(colour: str, page: str, share: float) -> str:
    """`share` of a colour over a page, as a hexadecimal colour."""
    blended = (round(share * a + (1 - share) * b) for a, b in zip(_channels(colour), _channels(page), strict=True))
    return "#" + "".join(f"{value:02x}" for value in blended)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, relative luminance)."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


def _luminance(colour: str) -> float:
    linear = [
        c / 12.92 if (c := value / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for value in _channels(colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
