"""The side channel of one composed model: foreign backbones can't hand extra arguments to a layer deep inside."""

from dataclasses import dataclass, field, replace

from mixwright.routing import Condition, Routing


@dataclass(slots=True)
class Channel:
    """What holds for the current pass. Written by `ComposedModel` only, read by its mixtures.

    `condition`: of the current pass. `lengths`: stream -> (batch, tokens) of the current pass. `trace`: site ->
    routings, or None when nobody listens. `override`: a routing put in place of what every router says. `enabled`:
    false makes every mixture its bare base.
    """

    condition: Condition = field(default_factory=Condition)
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    trace: dict[str, list[Routing]] | None = None
    override: Routing | None = None
    enabled: bool = True

    def condition_at(self, stream: str) -> Condition:
        """The condition of the current pass as retrievers take it: `token_mask` is of the tokens of a site's stream."""
        if stream == "decoder" or self.condition.encoder_mask is self.condition.token_mask:
            return self.condition
        return replace(self.condition, token_mask=self.condition.encoder_mask if stream == "encoder" else None)

    def note(self, site: str, routing: Routing) -> None:
        """Keep a routing if somebody is tracing."""
        if self.trace is not None:
            self.trace.setdefault(site, []).append(routing)
