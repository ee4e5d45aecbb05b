"""The three errors of the outer edge: files and catalogues, experts that do not fit, extras that are not installed.

A caller's mistake inside the library is a `ValueError` or a `TypeError`; these are for what comes from outside.
"""


class CatalogError(Exception):
    """A file, folder or catalogue entry was refused.

    `code` is stable (`SHAPE`, `HEADER`, `HASH`, ...) and stands first in the message; `where` names the adapter, file
    or key; `message` says what was found, what is accepted and what to do.
    """

    def __init__(self, code: str, where: str, message: str) -> None:
        super().__init__(f"{code} {where}: {message}")
        self.code = code
        self.where = where
        self.message = message


class IncompatibleExpert(CatalogError):
    """An expert that is well formed but does not fit this backbone or this pool."""


class MissingExtra(ImportError):
    """A feature needs a package that the base installation does not bring."""

    def __init__(self, extra: str, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs an extra: pip install 'mixwright[{extra}]'")
        self.extra = extra
