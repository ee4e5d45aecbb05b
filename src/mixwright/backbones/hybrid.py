"""Several causal language models as one: slots between their blocks, where a mixture may stand.

A pass goes embedding -> blocks -> head. At each slot whoever stands there asks components, by `Slot.run`, to run as far
as the end of that slot on a hidden state of its choice. A component is started when it is first asked, and never if
nobody asks; between slots it is suspended inside its own forward, so that masks, positions, multipliers, norms and
soft-caps stay its own.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithPast

from mixwright.backbones.parts import Parts, parts_of, split
from mixwright.backbones.session import Session


class Slot(nn.Module):
    """A place where components are mixed. By itself it follows one of them, the fallback.

    `number`: 0 is the embedding, 1 to K the blocks, K + 1 the head.
    """

    def __init__(self, number: int, fallback: int = 0) -> None:
        super().__init__()
        self.number = number
        self.fallback = fallback
        self.current: _Pass | None = None

    def run(self, component: int, hidden: Tensor | None = None) -> Tensor:
        """Let a component run to the end of this slot.

        From its embedding (0): the hidden state that enters its first layer, `(batch, seq, d_m)`. A block: what leaves
        the block when `hidden` of the same shape comes in; the last one's is after the final norm. The head: logits.
        """
        assert self.current is not None, "a slot ran outside a pass of its hybrid"
        return self.current.run(self.number, component, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The fallback's part of the pass."""
        return self.run(self.fallback, x if self.number else None)


class HybridBackbone(nn.Module):
    """Components of any architecture, cut in `num_blocks` runs of layers each, with slots between the runs.

    `names`: of the components. `widths`: of their hidden states. `vocab_size`: the columns that all of them have.
    """

    main_input_name = "input_ids"

    def __init__(self, components: Sequence[nn.Module], num_blocks: int, names: Sequence[str]) -> None:
        super().__init__()
        self.components = nn.ModuleList(components)
        self.names = tuple(names)
        self.num_blocks = num_blocks
        self.parts: tuple[Parts, ...] = tuple(parts_of(c, n) for c, n in zip(components, names))
        self.runs = tuple(split(parts.num_layers, num_blocks) for parts in self.parts)
        self.widths = tuple(int(parts.head.weight.shape[1]) for parts in self.parts)  # type: ignore[union-attr]
        self.vocab_size = min(int(parts.head.weight.shape[0]) for parts in self.parts)  # type: ignore[union-attr]
        self.embedding = Slot(0)
        self.blocks = nn.ModuleList(Slot(k + 1) for k in range(num_blocks))
        self.head = Slot(num_blocks + 1)
        self.__dict__["slots"] = (self.embedding, *self.blocks, self.head)
        self.config: Any = getattr(components[0], "config", None)

    @property
    def width(self) -> int:
        """D, of the stream: the largest of the widths."""
        return max(self.widths)

    def stops(self, component: int) -> list[nn.Module]:
        """The modules before which a component is suspended: the first layer of each block, and the head."""
        parts = self.parts[component]
        model = self.components[component]
        return [*(parts.layer(model, run[0]) for run in self.runs[component]), parts.head]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass; `labels` as in transformers: shifted inside, -100 left out."""
        assert input_ids is not None
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **kwargs}
        with self._pass(inputs):
            hidden = self.embedding(input_ids.unsqueeze(-1))
            for block in self.blocks:
                hidden = block(hidden)
            logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)  # type: ignore[arg-type]

    @contextmanager
    def _pass(self, inputs: dict[str, Any]) -> Generator[None]:
        current = _Pass(self, inputs)
        slots: tuple[Slot, ...] = self.__dict__["slots"]
        for slot in slots:
            slot.current = current
        try:
            yield
        finally:
            for slot in slots:
                slot.current = None
            current.close()


class _Pass:
    """The sessions of one pass, by component, and how far each is."""

    def __init__(self, hybrid: HybridBackbone, inputs: dict[str, Any]) -> None:
        self.hybrid, self.inputs = hybrid, inputs
        self.sessions: dict[int, Session] = {}
        self.at: dict[int, int] = {}
        self.held: dict[int, Tensor] = {}

    def run(self, number: int, component: int, hidden: Tensor | None) -> Tensor:
        if component not in self.sessions:
            model = self.hybrid.components[component]
            session = self.sessions[component] = Session(model, self.hybrid.stops(component), self.inputs)
            self.at[component], self.held[component] = 0, session.start()
        session = self.sessions[component]
        while self.at[component] < number - 1:  # blocks in which nobody asked for it: it goes on by itself
            self.at[component] += 1
            self.held[component] = session.resume(self.held[component])
        if number == 0:
            return self.held[component]
        self.at[component] = number
        out = session.resume(self.held[component] if hidden is None else hidden.to(self.held[component].dtype))
        if number == self.hybrid.num_blocks + 1:
            return out.logits[..., : self.hybrid.vocab_size]
        self.held[component] = out
        return out

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()
