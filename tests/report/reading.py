"""A page read back: its elements, its text, and the slices between the tokens' tooltips."""

from html.parser import HTMLParser

VOID = {"meta", "input", "line", "link", "br", "img"}


class Page(HTMLParser):
    """Collects tags, attributes, the text of the explained streams, and tooltips."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.explained = ""
        self.tips: list[str] = []
        self.words = ""
        self._open: list[tuple[str, set[str]]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        classes = set((dict(attrs).get("class") or "").split())
        if "tip" in classes:
            self.tips.append("")
        if tag not in VOID:
            self._open.append((tag, classes))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        inside = set().union(*(classes for _, classes in self._open)) if self._open else set()
        if self._open and self._open[-1][0] == "style":
            return
        self.words += data
        if "tip" in inside:
            self.tips[-1] += data + " "
        elif "text" in inside:
            self.explained += data

    def close(self) -> None:
        super().close()
        assert not self._open, f"never closed: {self._open}"
