"""Several causal language models as one: slots between their blocks, where a mixture may stand.

A pass goes embedding -> blocks -> head. At each slot whoever stands there asks components, by `Slot.run`, to run as far
as the end of that slot on a hidden state of its choice. A component is started when it is first asked, and never if
nobody asks; between slots it is suspended inside its own forward, so that masks, positions, multipliers, norms and
soft-caps stay its own.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage]
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from mixwright.backbones.absent import outside_of
from mixwright.backbones.coroutine import coroutine_type
from mixwright.backbones.hybrid_cache import HybridCache
from mixwright.backbones.parts import Parts, parts_of, runs_of, split
from mixwright.backbones.session import Pass, kept

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_IGNORED = frozenset({"return_dict", "output_attentions", "output_hidden_states", "num_items_in_batch"})


class Slot(nn.Module):
    """A place where components are mixed. By itself it follows one of them, the fallback.

    `number`: 0 is the embedding, 1 to K the blocks, K + 1 the head.
    """

    def __init__(self, number: int, fallback: int = 0) -> None:
        super().__init__()
        self.number = number
        self.fallback = fallback
        self.current: Pass | None = None

    def run(self, component: int, hidden: Tensor | None = None) -> Tensor:
        """Let a component run to the end of this slot.

        From its embedding (0): the hidden state that enters its first layer, `(batch, seq, d_m)`. A block: what leaves
        the block when `hidden` of the same shape comes in; the last one's is after the final norm. The head: logits.
        """
        assert self.current is not None, "a slot ran outside a pass of its hybrid"
        return self.current.run(self.number, component, hidden)

    def sole(self) -> int:
        """See `HybridBackbone._sole`."""
        return self.fallback

    def passed_over(self) -> None:
        """Nothing is to be done."""

    def forward(self, x: Tensor) -> Tensor:
        """The fallback's part of the pass."""
        return self.run(self.fallback, x if self.number else None)


class HybridBackbone(nn.Module, GenerationMixin):
    """Components of any architecture, cut in `num_blocks` runs of layers each, with slots between the runs.

    `names`: of the components. `widths`: of their hidden states; where one is narrower at some boundary, zeros fill it
    up. `vocab_size`: the columns that all components have, or fewer where the tokenizer has fewer; what lies beyond is
    padding, and never wins. `coroutines`: `greenlet`, `thread`, or None for what is installed. `layers`: how many each
    component has in each block, none where it can't be asked; None: as many in each, up to one.

    Where a mask is given without positions, positions count the real tokens, as in `generate`: left padding then
    changes nothing, learned positions included.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""

    def __init__(
        self,
        components: Sequence[nn.Module],
        num_blocks: int,
        names: Sequence[str],
        *,
        vocab_size: int | None = None,
        coroutines: str | None = None,
        layers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.components = nn.ModuleList(components)
        self.names = tuple(names)
        self.num_blocks = num_blocks
        self.parts = tuple(parts_of(component, name) for component, name in zip(components, names, strict=True))
        if layers is None:
            self.runs = tuple(split(parts.num_layers, num_blocks) for parts in self.parts)
        else:
            self.runs = tuple(map(runs_of, layers))
        self.tails = tuple(map(_tail, components, self.parts, self.runs))
        self.widths = tuple(max(parts.widths) for parts in self.parts)
        self.vocab_size = min(vocab_size or self.parts[0].vocab_size, *(parts.vocab_size for parts in self.parts))
        self.embedding = Slot(0)
        self.blocks = nn.ModuleList(Slot(k + 1) for k in range(num_blocks))
        self.head = Slot(num_blocks + 1)
        self.__dict__["slots"] = (self.embedding, *self.blocks, self.head)
        self._held: dict[int, tuple[nn.Module, Any, list[tuple[nn.Module, str]]]] = {}
        self._anchors: dict[int, tuple[nn.Module, nn.Module, str]] = {}
        self.places = tuple(map(_places, self.runs, self.tails))
        self._first = tuple([str(run[0]) for run in runs if run] or ["0"] for runs in self.runs)
        self.coroutine = coroutine_type(coroutines)
        self.config = _config(self)
        self.generation_config = _generation_config(self)

    @classmethod
    def can_generate(cls) -> bool:
        """As every causal language model of transformers says of itself."""
        return True

    @property
    def width(self) -> int:
        """D, of the stream: the largest of the widths."""
        return max(self.widths)

    @property
    def device(self) -> torch.device:
        """Where the stream is: the device of the first component. Others may be elsewhere."""
        return next(self.components[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first component. Each keeps its own, and is given hidden states in it."""
        return next(p.dtype for p in self.components[0].parameters() if p.is_floating_point())

    def stops(self, component: int) -> tuple[nn.Module, ...]:
        """The modules before which a component is suspended: the first layer of each block, and the head.

        One whose last layer is not of the last block is suspended behind it as well, before its own norm.
        """
        parts, model, tail = self.parts[component], self.components[component], self.tails[component]
        held = self._held.get(component)
        if held is None or held[0] is not model:
            ends = [path.rpartition(".") for path in (tail, parts.head) if path is not None]
            owners = [(model.get_submodule(owner), name) for owner, _, name in ends]
            held = self._held[component] = (model, model.get_submodule(parts.layers), owners)
        layers: Any = held[1]._modules  # pyright: ignore[reportPrivateUsage]  (an index costs much more)
        return *(layers[name] for name in self._first[component]), *(getattr(owner, name) for owner, name in held[2])

    def device_of(self, component: int) -> torch.device:
        """Where a component is: where its first parameter is."""
        model = self.components[component]
        held = self._anchors.get(component)
        if held is None or held[0] is not model:
            owner, _, leaf = next(model.named_parameters())[0].rpartition(".")
            held = self._anchors[component] = (model, model.get_submodule(owner), leaf)
        return getattr(held[1], held[2]).device

    def place(self, component: int, number: int) -> int:
        """Which of its stops is where a component enters slot `number`.

        Raises ValueError for a block of which it has no layers.
        """
        found = self.places[component][number]
        if found is None:
            raise ValueError(
                f"component {self.names[component]!r} has no layers in block {number - 1}: they were cut away when the "
                "hybrid was discretised. Set other mixture weights on the hybrid that it was made from."
            )
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass; arguments and result as in transformers: labels are shifted inside, those of -100 left out."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a hybrid embeds tokens with its components' own embeddings; expected input_ids alone.")
        _refuse_strange(kwargs)
        cache = past_key_values
        if cache is None and use_cache:
            cache = HybridCache()
        stands = self.stands()
        sole = self._sole(stands)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = _counted(attention_mask)[:, -input_ids.shape[1] :]
        current = Pass(self, input_ids, {"attention_mask": attention_mask, "position_ids": position_ids}, cache)
        if sole is None:
            with self._in_slots(current):
                logits = self._mixed(stands, input_ids, logits_to_keep)
                current.finish()
        else:
            logits = current.whole(sole, logits_to_keep)
            for stand in stands:
                stand.passed_over()  # type: ignore[operator]
            current.finish()
        loss = None
        if labels is not None:
            number = kwargs.get("num_items_in_batch")
            loss = ForCausalLMLoss(logits, labels, self.vocab_size, num_items_in_batch=number)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def stands(self) -> tuple[nn.Module, ...]:
        """Who stands at the slots: the slots themselves, or mixtures."""
        modules: Any = self._modules  # looked up here: an attribute that is a module is found last
        return modules["embedding"], *modules["blocks"]._modules.values(), modules["head"]

    def _sole(self, stands: Sequence[nn.Module]) -> int | None:
        """The component that everybody at the slots follows, if they know before the pass that they follow one.

        It can then go in one go. Whoever stands at a slot may say so by a method `sole`, and is told by `passed_over`
        that the pass went by; one whose calls somebody watches is called.
        """
        followed: int | None = None
        for stand in stands:
            ask: Any = getattr(stand, "sole", None)
            if ask is None or stand._forward_hooks or stand._forward_pre_hooks:
                return None
            found = ask()
            if found is None or followed not in (None, found):
                return None
            followed = found
        whole = followed is not None and self.tails[followed] is None and all(self.runs[followed])
        return followed if whole else None

    def _mixed(self, stands: Sequence[nn.Module], ids: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        learning = torch.is_grad_enabled() or bool(_has_any_global_hook())
        hidden = ids.unsqueeze(-1).float()
        for stand in stands[:-1]:
            hidden = _called(stand, hidden, learning)
        if isinstance(logits_to_keep, int):
            return _called(stands[-1], kept(hidden, logits_to_keep), learning)
        # whoever mixes tokens differently must know which these are
        return _called(stands[-1], hidden, learning)[:, logits_to_keep]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """That of every component, not reentrant unless asked."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for component in self.components:
            component.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]

    def gradient_checkpointing_disable(self) -> None:
        """That of every component."""
        for component in self.components:
            component.gradient_checkpointing_disable()  # type: ignore[operator]

    @contextmanager
    def _in_slots(self, current: Pass) -> Generator[None]:
        slots: tuple[Slot, ...] = self.__dict__["slots"]
        for slot in slots:
            slot.__dict__["current"] = current  # a module's own way of setting attributes takes ten times as long
        try:
            yield
        finally:
            for slot in slots:
                slot.__dict__["current"] = None
            current.close()

    # What `generate` asks of a model.

    @property
    def _is_stateful(self) -> bool:
        return any(getattr(component, "_is_stateful", False) for component in self.components)

    def uncached(self) -> str | None:
        """The name of a component that keeps no cache that can be carried; a hybrid with it has none either."""
        return next((name for parts, name in zip(self.parts, self.names) if parts.cache_name is None), None)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a hybrid holds each component's own "
                "dynamic cache; leave it out."
            )
        if self.uncached() is not None:
            generation_config.use_cache = False
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HybridCache()

    def is_remote_code(self) -> bool:
        """No code but the package's own is run."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Components choose how to run experts of their own."""
        return {}


def _called(stand: nn.Module, hidden: Tensor, learning: bool) -> Tensor:
    """Whoever stands at a slot is called, or, if they say that it comes to the same and nobody watches, what they do.

    They say so by a method `direct`, which is asked in every pass that learns nothing.
    """
    ask: Any = None if learning else getattr(stand, "direct", None)
    direct = None if ask is None else ask()
    return stand(hidden) if direct is None else direct(hidden)


def _counted(mask: Tensor) -> Tensor:
    """The positions of the real tokens."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def _tail(component: nn.Module, parts: Parts, runs: Sequence[range]) -> str | None:
    """Where a component is suspended behind its last layer; None where that is at the head, or nobody asks."""
    return outside_of(component, parts).tail if any(runs) and not runs[-1] else None


def _places(runs: Sequence[range], tail: str | None) -> tuple[int | None, ...]:
    """Which of a component's stops is the entry of each slot; None for a block without layers of its own."""
    before = [sum(map(bool, runs[:k])) for k in range(len(runs))]
    blocks = [place if run else None for place, run in zip(before, runs)]
    return 0, *blocks, max(1, sum(map(bool, runs))) + (tail is not None)


def _refuse_strange(kwargs: Mapping[str, Any]) -> None:
    strange = [name for name, value in kwargs.items() if name not in _IGNORED and value is not None]
    asked = [name for name in ("output_attentions", "output_hidden_states") if kwargs.get(name)]
    if strange:
        raise TypeError(f"a hybrid's forward takes no {strange[0]!r}.")
    if asked or kwargs.get("return_dict") is False:
        raise ValueError(f"{(asked or ['return_dict=False'])[0]}: a hybrid returns logits, loss and cache by name.")


def _config(hybrid: HybridBackbone) -> PreTrainedConfig:
    config = PreTrainedConfig(architectures=["HybridBackbone"])
    config.vocab_size, config.hidden_size = hybrid.vocab_size, hybrid.width
    limits = [getattr(_text(component), "max_position_embeddings", None) for component in hybrid.components]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if known:
        config.max_position_embeddings = min(known)
    for name in _SPECIAL:
        setattr(config, name, _first(name, [_text(component) for component in hybrid.components]))
    return config


def _generation_config(hybrid: HybridBackbone) -> GenerationConfig:
    """The special tokens of the first component that has them."""
    sources = [getattr(component, "generation_config", None) for component in hybrid.components]
    return GenerationConfig(**{name: _first(name, [*sources, hybrid.config]) for name in _SPECIAL})


def _text(component: nn.Module) -> Any:
    config: Any = component.config
    return config.get_text_config()


def _first(name: str, sources: Sequence[Any]) -> Any:
    return next((value for value in (getattr(source, name, None) for source in sources) if value is not None), None)
