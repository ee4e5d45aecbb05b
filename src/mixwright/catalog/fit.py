"""Does an expert fit a backbone? Everything that cannot be known from the adapter alone, before anything is built."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from mixwright.catalog.card import ExpertCard, SiteCard
from mixwright.catalog.peft_config import ALL_LINEAR, targeted
from mixwright.catalog.refusal import Faults, quote
from mixwright.errors import IncompatibleExpert

if TYPE_CHECKING:
    from mixwright.catalog.adapter import Expert


class LinearSite(Protocol):
    """A linear layer of the backbone: what `mixwright.sites.Site` is, without importing torch."""

    @property
    def d_in(self) -> int:
        """Input width."""
        ...

    @property
    def d_out(self) -> int:
        """Output width."""
        ...

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (d_in, d_out)."""
        ...


def fit(expert: "Expert", sites: Mapping[str, LinearSite]) -> None:
    """Check an expert against the linear sites of a backbone. Raises IncompatibleExpert as `fit_card`."""
    fit_card(expert.card, sites)


def fit_card(card: ExpertCard, sites: Mapping[str, LinearSite]) -> None:
    """Check an expert, known by its card, against all linear sites of a backbone (`mixwright.sites.linear_sites`).

    Raises IncompatibleExpert: TENSOR for a site that the backbone does not have, SHAPE for other widths, INCOMPLETE
    where the targets name layers that the adapter does not adapt, CONFIG where fan_in_fan_out contradicts the way the
    layers store their weights.
    """
    faults = Faults(f'adapter "{card.id}"', IncompatibleExpert)
    here = {path: site for path, site in card.sites.items() if path in sites}
    origin = f" It was trained on {quote(card.base_model, 60)}." if card.base_model else ""
    if not here:
        first = quote(next(iter(card.sites)))
        advice = "it would do nothing. Add it to the catalogue of the backbone that it was trained on."
        raise faults.stop("INCOMPLETE", f"this backbone has none of its sites (the first is {first}): {advice}{origin}")
    for path in card.sites:
        if path not in here:
            faults.add("TENSOR", f"{quote(path)} is no linear layer of this backbone.{origin}")
    for path, site in here.items():
        _check_widths(path, site, sites[path], origin, faults)
    missing = [path for path in sites if path not in here and _needed(path, card)]
    if missing:
        found = f"{len(missing)} layers that target_modules names have no factors, the first is {quote(missing[0])}."
        faults.add("INCOMPLETE", f"{found} Half an adapter is not used; save it again, or name only what it adapts.")
    _check_storage(card, [sites[path] for path in here], faults)
    faults.check()


def _check_widths(path: str, site: SiteCard, layer: LinearSite, origin: str, faults: Faults) -> None:
    if (site.d_in, site.d_out) != (layer.d_in, layer.d_out):
        ours, theirs = f"{layer.d_in} -> {layer.d_out}", f"{site.d_in} -> {site.d_out}"
        faults.add("SHAPE", f"{quote(path)} maps {ours} in this backbone; the adapter is for {theirs}.{origin}")


def _needed(path: str, card: ExpertCard) -> bool:
    """Whether PEFT would have adapted this layer. "all-linear" leaves out heads: those outside the numbered blocks."""
    if card.targets == ALL_LINEAR and not any(part.isdigit() for part in path.split(".")):
        return False
    return targeted(path, card.targets, card.excluded)


def _check_storage(card: ExpertCard, layers: list[LinearSite], faults: Faults) -> None:
    """PEFT keeps the flag of the last layer it visited, so a mixture of both kinds says nothing."""
    kinds = {layer.transposed for layer in layers}
    if kinds == {not card.fan_in_fan_out}:
        stored, flag = ("(d_in, d_out)", "true") if kinds == {True} else ("(d_out, d_in)", "false")
        faults.add("CONFIG", f"the layers store their weights as {stored}: fan_in_fan_out must be {flag}. Correct it.")
