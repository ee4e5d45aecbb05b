"""`run`: a composed model answers a prompt, and says which experts acted."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.cli.composition import Backbone, Folder, Task, opened, text_of
from mixwright.cli.few_shot import classify, reads_episodes
from mixwright.cli.output import Json, console, example, print_json

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel
    from mixwright.routing import Routing

_EXAMPLE = (
    "mixwright run composed --prompt 'Permission is hereby'",
    "mixwright run composed --prompt '- func: add' --max-new-tokens 32 --trace",
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("run", rich_help_panel="Look at the result", epilog=example(*_EXAMPLE))(run)


def run(
    composition: Folder,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What the model goes on from, or answers.")] = None,
    file: Annotated[str | None, typer.Option("--file", help="A file that holds it; - is standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Where sampling starts.")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Explain every token of prompt and answer.")] = False,
    task: Task = None,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Write the answer as it comes, and which experts had the say in it; of few-shot compositions, the class."""
    if reads_episodes(composition):
        classify(composition, task, prompt, file, backbone, as_json=as_json)
        return
    given = text_of("--prompt", prompt, file)
    model, tokenizer = opened(composition, backbone)
    can_generate = getattr(model.backbone, "can_generate", None)
    if can_generate is None or not can_generate():
        raise ValueError("this backbone writes no text; `mixwright explain` shows what its experts do.")
    from mixwright.composition.by_task import of_task
    from mixwright.evaluation.hybrid_rows import mixes_models
    from mixwright.evaluation.task_routing import is_task_routed

    condition = of_task(model, task)
    if trace and is_task_routed(model):
        raise ValueError(
            "--trace explains token by token, and this model is routed by task; leave it out. `mixwright explain "
            f"{composition}` shows which task uses which latent expert."
        )
    if trace and mixes_models(model):
        raise ValueError(
            "--trace explains experts beside a backbone, and this is a hybrid of whole models; leave it out. "
            f"`mixwright explain {composition} --text TEXT` measures it on a text."
        )
    say: Callable[[str], None] = _quiet if as_json else _write
    model.eval()
    with model.trace() as routings, model.under(condition):
        answer, count = _generate(model, tokenizer, given, say, max_new_tokens, temperature, seed)
    say("\n")
    shares = applied(model, routings)
    explained = _explained(model, tokenizer, given, answer) if trace else None
    if as_json:
        acted = [{"expert": expert, "weight": weight} for expert, weight in shares]
        full = explained.to_dict() if explained is not None else None
        print_json({"prompt": given, "task": task, "text": answer, "tokens": count, "experts": acted, "trace": full})
        return
    console().print()
    who = ", ".join(f"{e} {100 * w:.0f}%" for e, w in shares[:6]) or _retrieved(routings)
    console().print(f"{count} tokens; {who}", markup=False)
    if explained is not None:
        console().print()
        _print_explained(explained)


def _explained(model: "ComposedModel", tokenizer: Any, prompt: str, answer: str) -> Any:
    """Prompt and answer, token by token."""
    from mixwright.evaluation.explain import explain
    from mixwright.evaluation.neuron_text import explain_neurons, retrieves_neurons

    say = explain_neurons if retrieves_neurons(model) else explain
    return (
        say(model, tokenizer, prompt, target=answer) if _two_streams(model) else say(model, tokenizer, prompt + answer)
    )


def _print_explained(explained: Any) -> None:
    from mixwright.evaluation.neuron_text import NeuronText
    from mixwright.report.neuron_terminal import print_neuron_text
    from mixwright.report.terminal import print_explanation

    if isinstance(explained, NeuronText):
        print_neuron_text(explained, console())
    else:
        print_explanation(explained, console())


def _retrieved(routings: "dict[str, list[Routing]]") -> str:
    """How many of the experts that have no names had a say."""
    acted = counted = 0
    for each in routings.values():
        ids = [r.indices[r.weights != 0].unique() for r in each if r.indices is not None]
        acted += len({int(i) for part in ids for i in part.tolist()})
        counted += each[0].num_experts
    return f"{acted:,} of {counted:,} experts acted"


def _generate(
    model: "ComposedModel",
    tokenizer: Any,
    prompt: str,
    say: Callable[[str], None],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[str, int]:
    import torch

    device = next(model.backbone.parameters()).device
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(device)
    if not ids.shape[1]:
        raise ValueError("the prompt has no tokens; give some text.")
    stream = _Stream(tokenizer, say)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    torch.manual_seed(seed)
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=encoded["attention_mask"].to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=stream,
            **sampling,
        )
    return stream.text, len(stream.ids)


def _two_streams(model: "ComposedModel") -> bool:
    return bool(getattr(getattr(model.backbone, "config", None), "is_encoder_decoder", False))


def applied(model: "ComposedModel", routings: "dict[str, list[Routing]]") -> list[tuple[str, float]]:
    """Each expert's share of the applied routing weight over all sites and tokens, the largest first.

    Nothing for experts without names, of which each site may have a million of its own.
    """
    import torch

    if not model.experts:
        return []
    total = torch.zeros(len(model.experts))
    for each in routings.values():
        for routing in each:
            total += routing.dense().reshape(-1, len(model.experts)).float().sum(0).cpu()
    shares = (total / total.sum().clamp_min(1e-12)).tolist()
    order = sorted(range(len(shares)), key=shares.__getitem__, reverse=True)
    return [(model.experts[place], shares[place]) for place in order if shares[place] > 0]


class _Stream:
    """What `generate` hands its tokens to: whole characters are said as soon as they are known."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._say = say
        self._started = False

    def put(self, value: Any) -> None:
        """Some more token ids; the first call brings the prompt, or a decoder's start token."""
        if not self._started:
            self._started = True
            return
        self.ids += value.flatten().tolist()
        self._tell(self._tokenizer.decode(self.ids, skip_special_tokens=True), whole=False)

    def end(self) -> None:
        """No more tokens follow."""
        self._tell(self._tokenizer.decode(self.ids, skip_special_tokens=True), whole=True)

    def _tell(self, text: str, *, whole: bool) -> None:
        if whole or not text.endswith("\ufffd"):
            self._say(text[len(self.text) :])
            self.text = text


def _write(text: str) -> None:
    from mixwright.report.markup import visible

    sys.stdout.write(visible(text))
    sys.stdout.flush()


def _quiet(text: str) -> None:
    del text
