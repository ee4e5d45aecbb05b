"""What stands on the card of an expert that comes in, and whether it is for this backbone."""

from datetime import UTC, datetime
from typing import Any

from mixwright.catalog.bundle import Bundle
from mixwright.catalog.card import ExpertCard, SiteCard, Source
from mixwright.catalog.refusal import quote, refuse
from mixwright.catalog.shelf import Binding

MAX_TEXT = 2000


def make_card(
    bundle: Bundle,
    expert_id: str,
    source: Source,
    *,
    binding: Binding | None,
    confirm_base: bool,
    task: str | None,
    licence: str | None,
    recipe: dict[str, Any] | None = None,
    quality: dict[str, Any] | None = None,
) -> ExpertCard:
    """The card of an expert whose files are in `bundle`; what it brought on a card of its own is kept."""
    config, brought = bundle.config, bundle.card
    card = ExpertCard(
        id=expert_id,
        backbone=brought.backbone if brought else None,
        base_model=config.base_model,
        sites=site_cards(bundle),
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        fan_in_fan_out=config.fan_in_fan_out,
        targets=config.targets,
        excluded=config.excluded,
        dtype=dtype_of(bundle),
        task=_text("task", task or (brought.task if brought else None), expert_id),
        licence=_text("licence", licence or (brought.licence if brought else None), expert_id),
        source=source,
        recipe=recipe or (brought.recipe if brought else {}),
        quality=quality or (brought.quality if brought else {}),
        added=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        files={},
    )
    confirmed = check_base(card, binding, confirm_base)
    return card.with_files(bundle.files, base_confirmed=confirmed)


def site_cards(bundle: Bundle) -> dict[str, SiteCard]:
    """The sites of an adapter as a card lists them."""
    return {
        path: SiteCard(d_in=site.d_in, d_out=site.d_out, rank=site.rank, scale=site.scale)
        for path, site in bundle.sites.items()
    }


def dtype_of(bundle: Bundle) -> str:
    """The dtype of the factors: one name, or several joined."""
    return "+".join(
        sorted({site.down.dtype for site in bundle.sites.values()} | {s.up.dtype for s in bundle.sites.values()})
    )


def check_base(card: ExpertCard, binding: Binding | None, confirmed: bool) -> bool:
    """Whether an operator's word was needed for the backbone. Raises CatalogError (BASE) where it is missing."""
    if binding is None:
        return False
    where = f"adapter {quote(card.id)}"
    if card.backbone is not None and card.backbone != binding.fingerprint:
        found = f"its card names the backbone {card.backbone[:12]}, this catalogue is for {binding.fingerprint[:12]}"
    elif card.base_model and binding.name and not same_model(card.base_model, binding.name):
        found = f"its configuration names {quote(card.base_model)}, this catalogue is for {quote(binding.name)}"
    else:
        return False
    if not confirmed:
        raise refuse(
            "BASE", where, f"{found}. If both are the same weights, confirm it (confirm_base=True, --confirm-base)."
        )
    return True


def same_model(one: str, other: str) -> bool:
    """Whether two names can mean one model: equal, or, where one may be a folder's path, equal in their last part."""
    if one.rstrip("/") == other.rstrip("/"):
        return True
    local = any(name.startswith(("/", ".", "~")) or name.count("/") != 1 for name in (one, other))
    return local and one.rstrip("/").rsplit("/", 1)[-1] == other.rstrip("/").rsplit("/", 1)[-1]


def _text(name: str, value: str | None, expert_id: str) -> str | None:
    if value is not None and len(value) > MAX_TEXT:
        message = f"{name} has {len(value)} characters; at most {MAX_TEXT} are accepted. Shorten it."
        raise refuse("CARD", f"adapter {quote(expert_id)}", message)
    return value
