"""The card of an expert: what is known about it without its weights. This file needs no torch.

A card is sealed: it carries the SHA-256 of itself and of every other file of its folder.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mixwright.catalog.document import parse, render
from mixwright.catalog.refusal import quote, refuse
from mixwright.files import sha256_bytes

CARD = "card.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
GATES = "gate.safetensors"
SIGNATURES = "signature.safetensors"
FORMAT = 1
RESERVED = "backbone"  # the null expert's id in every pool
MAX_CARD = 4 * 1024 * 1024
_ID = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9._\-]{0,63}")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

State = Literal["active", "disabled", "retired"]


@dataclass(frozen=True, kw_only=True)
class SiteCard:
    """One adapted site: the widths of the backbone's layer, the rank of the update and its scale."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    d_in: int
    d_out: int
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an expert came from: a folder, a hub repository at a commit, or a training run of this toolkit."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    kind: Literal["folder", "hub", "trained"]
    name: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must be: its SHA-256 and its length in bytes."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ExpertCard:
    """What a catalogue knows of one expert."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    id: str
    backbone: str | None
    """Fingerprint of the backbone that it was checked against; None until it has been."""
    base_model: str | None
    """The name of the backbone that its configuration gives."""
    base_confirmed: bool = False
    """An operator said that a differing name is the same backbone."""
    sites: dict[str, SiteCard]
    rank: int
    alpha: float
    rslora: bool = False
    fan_in_fan_out: bool = False
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    dtype: str
    task: str | None = None
    licence: str | None = None
    source: Source
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    quality: dict[str, Any] = field(default_factory=dict[str, Any])
    added: str
    """When it was added, UTC."""
    files: dict[str, FileRecord]
    format: int = FORMAT

    @property
    def has_gates(self) -> bool:
        """Whether a gate vector per site came with it."""
        return GATES in self.files

    @property
    def has_signatures(self) -> bool:
        """Whether statistics of the backbone's activations came with it."""
        return SIGNATURES in self.files

    def with_files(self, files: Mapping[str, bytes], **changes: Any) -> "ExpertCard":
        """This card for a folder that holds these files, with other fields changed."""
        records = {name: FileRecord(sha256=sha256_bytes(data), bytes=len(data)) for name, data in files.items()}
        return replace(self, files=records, **changes)


def check_id(expert_id: str) -> str:
    """An id that may name a folder and stand in a page. Raises CatalogError (NAME)."""
    if _ID.fullmatch(expert_id) and expert_id != RESERVED:
        return expert_id
    message = (
        "an id has 1 to 64 letters, digits, dots, _ and -, begins with no dot, and is not "
        f'"{RESERVED}". Give another with expert_id.'
    )
    raise refuse("NAME", f"expert {quote(expert_id)}", message)


def write_card(card: ExpertCard) -> bytes:
    """The bytes of card.json, sealed."""
    return seal(asdict(card))


def read_card(data: bytes, where: str) -> ExpertCard:
    """A card from the bytes of card.json. Raises CatalogError: JSON, DUP, HASH (changed since), CARD, VERSION, NAME."""
    value = unseal(data, where)
    if value.get("format") != FORMAT:
        raise refuse("VERSION", where, f"card format {quote(str(value.get('format')))}; this release reads {FORMAT}.")
    try:
        card = TypeAdapter(ExpertCard).validate_json(render(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        raise refuse(
            "CARD", where, f"card.json: {quote(at)}: {first['msg']}. Remove it to add the bare adapter."
        ) from None
    check_id(card.id)
    return card


def seal(value: dict[str, Any]) -> bytes:
    """JSON with the SHA-256 of the rest of itself, so that any change of it is seen."""
    return render({**value, "seal": sha256_bytes(render(value))})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """What `seal` wrote. Raises CatalogError: JSON, DUP, HASH."""
    value = parse(data, where)
    given = value.pop("seal", None)
    try:
        unchanged = data == seal(value) and given == sha256_bytes(render(value))
    except (ValueError, UnicodeEncodeError):
        unchanged = False
    if not unchanged:
        message = "its content is not what was sealed when it was written. Restore it from a copy, or remove it."
        raise refuse("HASH", where, message)
    return value
