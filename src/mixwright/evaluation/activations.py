"""What the sites of a model see: means and variances of their inputs over real tokens.

Average activation (PHATGOOSE's baseline) is such a mean with the expert itself acting, on its own text and, at the
decoder's sites, on its own greedy output: every decoding step counts. The released code keeps the last step only.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import IGNORED, Batch


@dataclass
class Moments:
    """Running sums at one site, in float64: real tokens seen, their sum, and the sum of their squares.

    `squares` is (d_in,), or (d_in, d_in) with the products of all pairs of features, for a whole covariance.
    """

    count: float
    total: Float[Tensor, " d_in"]
    squares: Float[Tensor, "*paired d_in"]

    @classmethod
    def empty(cls, d_in: int, device: torch.device, *, paired: bool = False) -> "Moments":
        """Nothing seen yet."""
        shape = (d_in, d_in) if paired else (d_in,)
        zeros = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(0.0, torch.zeros(d_in, dtype=torch.float64, device=device), zeros)

    def add(self, x: Float[Tensor, "tokens d_in"]) -> None:
        """Some more tokens."""
        wide = x.double()
        self.count += len(wide)
        self.total = self.total + wide.sum(0)
        # products of pairs in float32, whose error is far below that of estimating a covariance from a sample
        self.squares = self.squares + ((x.T @ x).double() if self.squares.dim() == 2 else wide.square().sum(0))

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Over all tokens, float32."""
        return (self.total / max(self.count, 1.0)).float()

    def signature(self, rank: int = 0) -> dict[str, Tensor]:
        """`mean`, `variance` and `count`, and with a `rank` the strongest directions of the covariance as `factor`.

        The factor needs moments of pairs. Divided by the number of tokens; see `routers/signature.py`.
        """
        count = max(self.count, 1.0)
        mean = self.total / count
        square = self.squares.diagonal() if self.squares.dim() == 2 else self.squares
        variance = (square / count - mean.square()).clamp_min(0.0)
        found = {"mean": mean.float(), "variance": variance.float(), "count": torch.tensor(self.count)}
        if rank > 0:
            found["factor"] = _strongest(self.squares / count - torch.outer(mean, mean), rank).float()
        return found


def _strongest(covariance: Float[Tensor, "d_in d_in"], rank: int) -> Float[Tensor, "rank d_in"]:
    """The strongest principal directions, each times its standard deviation: subspace iteration, always the same."""
    width = min(rank + 8, covariance.shape[0])
    start = torch.randn(covariance.shape[0], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start.to(covariance.device)).Q
    for _ in range(8):
        basis = torch.linalg.qr(covariance @ basis).Q
    size, axes = torch.linalg.eigh(basis.T @ covariance @ basis)
    found = (basis @ axes * size.clamp_min(0.0).sqrt()).T.flip(0)
    return found[:rank].contiguous()


def moments(model: ComposedModel, batches: Sequence[Batch], *, paired: bool = False) -> dict[str, Moments]:
    """Site -> moments of its input over all real tokens of `batches`, with the model as it stands (see `only`).

    Targets are read by teacher forcing, so that every decoding step but the one after the last token counts. An
    expert's signature is made of these with the model `disabled`: they are the backbone's own.
    """
    streams = model.probe.streams()
    found: dict[str, Moments] = {}
    with eval_mode(model):
        for batch in batches:
            masks = _stream_masks(batch)
            with _watching(model, found, streams, masks, paired):
                model(**_inputs(model, batch))
    return found


def average_activations(model: ComposedModel, examples: Sequence[Sequence[Batch]]) -> dict[str, Tensor]:
    """Site -> (experts, d_in): each expert's mean input on its own examples, the expert acting, targets its own.

    `examples` are batches for each expert in the order of the pool; a null expert at the end needs none and gets zeros.
    """
    rows: dict[str, list[Tensor]] = {}
    for expert, batches in zip(model.experts, examples, strict=False):
        with model.only(expert):
            own = [batch if batch.kind == "encoder" else greedy(model, batch) for batch in batches]
            for site, seen in moments(model, own).items():
                rows.setdefault(site, []).append(seen.mean)
    missing = len(model.experts) - len(examples)
    return {site: torch.stack([*means, *[torch.zeros_like(means[0])] * missing]) for site, means in rows.items()}


def greedy(model: ComposedModel, batch: Batch) -> Batch:
    """The batch with the model's own greedy output in place of its targets, as long as the longest target at most."""
    steps = int((batch.targets != IGNORED).sum(-1).max())
    with eval_mode(model):
        if batch.kind == "seq2seq":
            inputs: dict[str, Any] = dict(batch.inputs)
            written = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, 1:]
            return replace(batch, targets=_until_end(written, _end(model)))
        prompts = _left_padded_prompts(batch, _pad(model))
        written = model.generate(**prompts, max_new_tokens=steps, do_sample=False)
    return _continued(batch, prompts, written, _end(model), _pad(model))


def _left_padded_prompts(batch: Batch, pad: int) -> dict[str, Any]:
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    counted = batch.targets != IGNORED
    before = counted.long().cumsum(-1) - counted.long() == 0
    prompts = [row[keep] for row, keep in zip(ids, mask & before, strict=True)]
    width = max(len(prompt) for prompt in prompts)
    out = ids.new_full((len(prompts), width), pad)
    real = torch.zeros_like(out)
    for at, prompt in enumerate(prompts):
        out[at, width - len(prompt) :], real[at, width - len(prompt) :] = prompt, 1
    return {"input_ids": out, "attention_mask": real}


def _continued(batch: Batch, prompts: Mapping[str, Tensor], written: Tensor, end: int | None, pad: int) -> Batch:
    """Prompt and continuation in one row again; the end token is a target but no input."""
    width = prompts["input_ids"].shape[1]
    new = _until_end(written[:, width:], end)
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    for ids, real, tail in zip(prompts["input_ids"], prompts["attention_mask"].bool(), new, strict=True):
        prompt, tail = ids[real], tail[tail != IGNORED]
        rows.append(torch.cat([prompt, tail[:-1]]))
        targets.append(torch.cat([prompt.new_full((len(prompt) - 1,), IGNORED), tail]))
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    wanted = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    return replace(batch, inputs={"input_ids": ids, "attention_mask": mask}, targets=wanted)


def _until_end(written: Tensor, end: int | None) -> Tensor:
    """Generated ids with everything after the first end token ignored."""
    if end is None:
        return written
    ended = (written == end).long().cumsum(-1) - (written == end).long()
    return written.masked_fill(ended > 0, IGNORED)


def _end(model: ComposedModel) -> int | None:
    end: Any = model.config.eos_token_id
    return end[0] if isinstance(end, list | tuple) else end


def _pad(model: ComposedModel) -> int:
    return int(model.config.pad_token_id or 0)


def _inputs(model: ComposedModel, batch: Batch) -> dict[str, Any]:
    if batch.kind == "encoder":
        return dict(batch.inputs)
    inputs: dict[str, Any] = {**batch.inputs, "use_cache": False}
    if batch.kind == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch.targets)
        inputs["decoder_attention_mask"] = (batch.targets != IGNORED).long()
    return inputs


def _stream_masks(batch: Batch) -> dict[str, Bool[Tensor, "batch seq"]]:
    source = batch.inputs["attention_mask"].bool()
    if batch.kind == "seq2seq":
        return {"encoder": source, "cross": source, "decoder": batch.targets != IGNORED}
    return {"decoder": source}


@contextmanager
def _watching(
    model: ComposedModel,
    found: dict[str, Moments],
    streams: Mapping[str, str],
    masks: Mapping[str, Tensor],
    paired: bool,
) -> Generator[None]:
    with ExitStack() as hooks:
        for site, mixture in model.mixtures.items():
            hook = _recorder(site, found, masks.get(streams[site]), paired)
            hooks.callback(mixture.register_forward_pre_hook(hook).remove)
        yield


def _recorder(site: str, found: dict[str, Moments], mask: Tensor | None, paired: bool) -> Any:
    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        x = args[0].detach()
        tokens = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        found.setdefault(site, Moments.empty(x.shape[-1], x.device, paired=paired)).add(tokens)

    return record
