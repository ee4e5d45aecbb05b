"""An expert as it came: each file's bytes, read once, and what they say. Nothing here needs torch or looks at a value.

The same bytes are validated, hashed, copied into the catalogue and made into tensors; a path is never opened again.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from mixwright.catalog.card import CARD, CONFIG, GATES, MAX_CARD, SIGNATURES, WEIGHTS, ExpertCard, read_card
from mixwright.catalog.folder import Folder
from mixwright.catalog.header import Header, header_length, read_header
from mixwright.catalog.layout import SiteLayout, lay_out
from mixwright.catalog.peft_config import MAX_CONFIG, LoraConfig, read_config
from mixwright.catalog.refusal import quote, refuse
from mixwright.catalog.vectors import check_gates, check_signatures
from mixwright.files import read_exactly, sha256_bytes

MAX_WEIGHTS = 16 * 1024**3
_UNREADABLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".h5", ".gguf")


@dataclass(frozen=True, slots=True)
class Bundle:
    """The bytes of an expert's files, and their meaning."""

    config: LoraConfig
    sites: dict[str, SiteLayout]
    headers: dict[str, Header]
    files: dict[str, bytes]
    card: ExpertCard | None


def read_bundle(folder: Folder) -> Bundle:
    """Read and validate an expert's folder. Raises CatalogError with the code of what is wrong."""
    where, present = folder.where, folder.names()
    check_present(present, where)
    card = read_card(folder.read(CARD, MAX_CARD), where) if CARD in present else None
    files = {CONFIG: folder.read(CONFIG, MAX_CONFIG)}
    headers: dict[str, Header] = {}
    config = read_config(files[CONFIG], where)
    sites: dict[str, SiteLayout] = {}

    def lay(header: Header) -> None:
        sites.update(lay_out(config, header, where))

    files[WEIGHTS], headers[WEIGHTS] = read_tensors(folder, WEIGHTS, lay)
    checks = ((GATES, check_gates), (SIGNATURES, check_signatures))
    for name, check in checks:
        if name in present:
            files[name], headers[name] = read_tensors(
                folder, name, lambda header, check=check: check(header, sites, where)
            )
    if card is not None:
        _check_hashes(card, files, where)
    return Bundle(config, sites, headers, files, card)


def check_present(present: set[str], where: str) -> None:
    """Whether a folder holds what every adapter has. Raises CatalogError (FORMAT)."""
    if WEIGHTS in present and CONFIG in present:
        return
    unreadable = sorted(name for name in present if name.startswith("adapter_") and name.endswith(_UNREADABLE))
    if WEIGHTS not in present and unreadable:
        advice = (
            "Where you trust it, load it with PEFT and call save_pretrained, which writes safetensors; add that folder."
        )
        raise refuse("FORMAT", where, f"{quote(unreadable[0])} may run code when read and is not opened. {advice}")
    missing = CONFIG if CONFIG not in present else WEIGHTS
    raise refuse("FORMAT", where, f"there is no {missing}; a PEFT adapter folder has {CONFIG} and {WEIGHTS}.")


def parse_bundle(files: dict[str, bytes], where: str) -> Bundle:
    """As `read_bundle`, for files that were just made and lie in memory."""
    config = read_config(files[CONFIG], where)
    headers = {name: _header(data, where) for name, data in files.items() if name != CONFIG}
    sites = lay_out(config, headers[WEIGHTS], where)
    if GATES in headers:
        check_gates(headers[GATES], sites, where)
    if SIGNATURES in headers:
        check_signatures(headers[SIGNATURES], sites, where)
    return Bundle(config, sites, headers, dict(files), None)


def read_tensors(folder: Folder, name: str, check: Callable[[Header], None]) -> tuple[bytes, Header]:
    """The bytes and the header of a safetensors file, its data read only after the header has passed `check`.

    Raises CatalogError: SIZE, HEADER, DUP, DTYPE, and what `check` raises.
    """
    with folder.open(name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_WEIGHTS:
            raise refuse("SIZE", folder.where, f"{name} has {size} bytes; at most {MAX_WEIGHTS} are accepted.")
        first = read_exactly(descriptor, 8)
        text = read_exactly(descriptor, header_length(first, size, folder.where))
        header = read_header(text, size, folder.where)
        check(header)
        data = first + text + read_exactly(descriptor, size - len(first) - len(text))
    if len(data) != size:
        raise refuse("HEADER", folder.where, f"{name} became shorter while it was read. Add it when nothing writes it.")
    return data, header


def _header(data: bytes, where: str) -> Header:
    length = header_length(data[:8], len(data), where)
    return read_header(data[8 : 8 + length], len(data), where)


def _check_hashes(card: ExpertCard, files: dict[str, bytes], where: str) -> None:
    for name in sorted(set(card.files) | set(files)):
        record, data = card.files.get(name), files.get(name)
        if record is None or data is None:
            found = "not on the card" if record is None else "on the card, but not here"
            raise refuse("HASH", where, f"{quote(name)} is {found}. Copy the whole folder again, or remove card.json.")
        if record.bytes != len(data) or record.sha256 != sha256_bytes(data):
            raise refuse("HASH", where, f"{name} is not the file that the card describes (SHA-256). Copy it again.")
