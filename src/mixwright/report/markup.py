"""The frame of a page, and the one way that foreign text gets into it.

Expert names, cards and prompts are written by strangers. A page holds no script, its content policy allows none, and
every string passes `escape`.
"""

import html
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.resources import files

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """The text with every character that would hide, reorder or break it replaced by a sign: `\\x00` by ␀, a
    right-to-left override by ⟨202E⟩. Line feeds and tabs stay."""
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    number = ord(character)
    if character in "\n\t":
        return character
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    hidden = unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")
    return f"\u27e8{number:04X}\u27e9" if hidden or character in _REORDERING else character


def escape(text: object) -> str:
    """Text made safe for an element or a quoted attribute."""
    return html.escape(visible(str(text)), quote=True)


def tag(name: str, /, *content: str, **attributes: object) -> str:
    """An element. Content is markup already; attribute values are escaped here. `class_` stands for `class`, an
    underscore for a hyphen; an attribute that is None is left out, True gives its bare name."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    end = "" if name == "input" else f"</{name}>"
    return f"<{name}{given}>{''.join(content)}{end}"


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(value)}"'


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table in a box that scrolls sideways by itself in a narrow window. Names of columns are escaped here."""
    top = tag("tr", *(tag("th", escape(name), scope="col") for name in head))
    return tag("div", tag("table", tag("thead", top), tag("tbody", *rows)), class_="wide", tabindex="0")


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page that needs nothing beside itself. `style` is added to the house's own."""
    sheet = files("mixwright.report").joinpath("style.css").read_text(encoding="utf-8")
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{sheet}{style}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        )
    )
