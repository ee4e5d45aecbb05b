"""How a refusal is worded: a stable code, where, what was found, what is accepted, what to do; 400 characters at most.

Text out of a file is not trusted: at most 80 characters of it are shown, control characters as escapes.
"""

from mixwright.errors import CatalogError

MAX_MESSAGE = 400
MAX_QUOTE = 80
MAX_FAULTS = 20


def show(value: object, limit: int = MAX_QUOTE) -> str:
    """Untrusted text, number or value for a message: one line, printable, at most `limit` characters."""
    text = value if isinstance(value, str) else _plain(value)
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return escaped if len(escaped) <= limit and len(text) <= limit else escaped[: limit - 1] + "…"


def quote(value: object, limit: int = MAX_QUOTE) -> str:
    """`show`, in double quotes."""
    return f'"{show(value, limit - 2)}"'


class Faults:
    """What is wrong with one thing, collected so that a user sees up to 20 faults at once.

    The first fault gives the refusal its code and message; the others follow as notes of the exception.
    """

    def __init__(self, where: str, kind: type[CatalogError] = CatalogError) -> None:
        self.where = where
        self.kind = kind
        self._found: list[tuple[str, str]] = []

    def add(self, code: str, message: str) -> None:
        """Note a fault; beyond the twentieth they are dropped."""
        if len(self._found) < MAX_FAULTS:
            self._found.append((code, message))

    def check(self) -> None:
        """Raise the refusal if there was a fault."""
        if not self._found:
            return
        (code, message), *others = self._found
        more = f" ({len(others)} more below.)" if others else ""
        error = self.kind(code, self.where, self._fit(code, message, more))
        for other_code, other in others:
            error.add_note(f"{other_code} {self.where}: {self._fit(other_code, other)}")
        raise error

    def stop(self, code: str, message: str) -> CatalogError:
        """The refusal for a fault after which it is not safe to go on, with those found before it: `raise` it."""
        self._found.insert(0, (code, message))
        try:
            self.check()
        except CatalogError as error:
            return error
        raise AssertionError("a fault was just added")

    def _fit(self, code: str, message: str, more: str = "") -> str:
        room = MAX_MESSAGE - len(code) - len(self.where) - 3 - len(more)
        return (message if len(message) <= room else message[: room - 1] + "…") + more


def refuse(code: str, where: str, message: str) -> CatalogError:
    """A refusal with its one fault, cut to the length a message may have: `raise` it."""
    return Faults(where).stop(code, message)


def _plain(value: object) -> str:
    if isinstance(value, (bool, int, float)) or value is None:
        return repr(value)[: MAX_QUOTE + 1]
    return type(value).__name__
