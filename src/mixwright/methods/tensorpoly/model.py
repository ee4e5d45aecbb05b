"""TensorPoly (Su et al. 2024), from top to bottom: latent experts at every adapted linear layer, mixed per task.

At a site with input x of task t, R latent experts s, and rank r:

1. look up the task's row and make it weights: w_t = sigmoid(Z_t) / sum_s sigmoid(Z_ts) (`TaskLogits`);
2. build every latent expert's columns as tensor products of its leaves, a_s = u_s^(1) x ... x u_s^(N), cut to d_in;
3. mix in parameter space: A_t = sum_s w_ts a_s, B_t = sum_s w_ts b_s (TensorPoly-I; in TensorPoly-II the leaves of each
   order are mixed first) (`experts.tensor`);
4. y = W x + (1/r) x A_t B_t.
"""

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mixwright.backbones.hf import provenance
from mixwright.composition.by_task import of_task
from mixwright.composition.exporting import Exported, export_lora
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.probe import called_sites, probe
from mixwright.config import decode
from mixwright.evaluation.task_cost import Cost, count
from mixwright.methods.tensorpoly.config import METHOD, TensorPolyConfig
from mixwright.methods.tensorpoly.initial import Draw, check_alive, first_factors, first_logits
from mixwright.methods.tensorpoly.latent import assemble, positions
from mixwright.ops.digest import fingerprint
from mixwright.routers.base import AbstractRouter
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.task import AbstractTaskRouter, TaskLogits
from mixwright.sites import Site, linear_sites

if TYPE_CHECKING:
    from mixwright.catalog.store import Catalog
    from mixwright.methods.tensorpoly.adaptation import Adaptation, What
    from mixwright.methods.tensorpoly.shots import Examples
    from mixwright.methods.tensorpoly.similarity import Inputs, Likeness, Texts


def compose(
    config: TensorPolyConfig, backbones: Sequence[nn.Module], catalog: "Catalog | None" = None
) -> "TaskComposedModel":
    """Fresh latent experts at the sites of one backbone: steps 1 to 4 of the module's text, before training.

    Everything random depends on `config.seed` alone, and the experts not on tasks or sharing. Raises ValueError for
    settings that do not fit each other or the backbone, IncompatibleExpert for a site where experts would do nothing;
    the backbone is then as it was.
    """
    if len(backbones) != 1 or catalog is not None:
        raise ValueError("tensorpoly trains latent experts of its own on one backbone; give no catalogue.")
    (backbone,), settled = backbones, config.settled()
    if settled.is_routed and not settled.tasks:
        raise ValueError(f"tasks: missing; {settled.experts} mixes its experts per task, give the names of the tasks.")
    sites = chosen_sites(settled, backbone)
    seen = probe(backbone, list(sites))
    draw = None if _device(backbone, next(iter(sites))).type == "meta" else torch.Generator().manual_seed(settled.seed)
    factors = {path: first_factors(settled, sites[path].d_in, sites[path].d_out, draw) for path in seen.sites}
    routers = make_routers(settled, list(seen.sites), draw)
    mixtures: dict[str, Mixture] = {}
    for path, (down, up) in factors.items():
        check_alive(down, up, path)
        experts = assemble(settled, down, up, sites[path].d_in, sites[path].d_out)
        device = _device(backbone, path)
        mixtures[path] = Mixture(backbone.get_submodule(path), routers[path].to(device), experts.to(device))
    model = TaskComposedModel(backbone, mixtures, pool(settled), _description(settled, backbone), seen)
    return model.train(backbone.training)


def chosen_sites(config: TensorPolyConfig, backbone: nn.Module) -> dict[str, Site]:
    """The sites that the config names, in the backbone's order. Raises ValueError where heads do not divide a width."""
    sites = linear_sites(backbone)
    chosen = {path: sites[path] for path in called_sites(backbone, config.target_modules)}
    if not chosen:
        raise ValueError("target_modules: the backbone has no linear layer inside its blocks; name the sites.")
    heads = config.heads or 1
    for path, site in chosen.items():
        for name, width in (("d_in", site.d_in), ("d_out", site.d_out)):
            if width % heads:
                raise ValueError(
                    f"heads={heads} does not divide {name}={width} of {path}; head counts that divide every width "
                    f"here: {', '.join(map(str, _common_divisors(chosen.values())))}."
                )
    return chosen


def make_routers(config: TensorPolyConfig, paths: Sequence[str], draw: Draw) -> dict[str, AbstractRouter]:
    """Step 1: one router for each site, the same object for sites that share."""
    latent, apart = config.num_latent or 1, positions(config)
    if not config.is_routed:
        return {path: ConstantRouter(torch.ones(latent)) for path in paths}
    shape = (len(config.tasks), latent) if apart is None else (len(config.tasks), apart, latent)
    routers: dict[str, AbstractRouter] = {}
    for path in paths:
        key = shared_by(path, config.share)
        if key not in routers:
            routers[key] = learned(config, first_logits(shape, draw))
    return {path: routers[shared_by(path, config.share)] for path in paths}


def learned(config: TensorPolyConfig, logits: Tensor) -> TaskLogits:
    """A router over Z = `logits`, as the config wants it."""
    return TaskLogits(
        logits, noise=config.noise, temperature=config.temperature, straight_through=config.straight_through
    )


def shared_by(path: str, share: str) -> str:
    """A name for all sites that use the router of this one. A block is a path up to its first number."""
    if share == "model":
        return ""
    parts = path.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return path if share == "layer" or numbered is None else ".".join(parts[: numbered + 1])


def pool(config: TensorPolyConfig) -> tuple[str, ...]:
    """Ids of the latent experts."""
    return tuple(f"latent-{i}" for i in range(config.num_latent or 1))


class TaskComposedModel(ComposedModel):
    """A composed model whose rows of a batch belong to tasks: `with model.with_task("rte"): model(**inputs)`."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, by id."""
        return tuple(self.composition.config.get("tasks", ()))

    def task_id(self, task: str | int) -> int:
        """The id of a task given by name or id. Raises ValueError for one that the model does not know."""
        known = self.tasks
        if isinstance(task, str):
            if task in known:
                return known.index(task)
            near = get_close_matches(task, known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known[:10]) or 'none'}."
            raise ValueError(f"no task {task!r} in this model; {advice}")
        if isinstance(task, bool) or not 0 <= task < len(known):
            raise ValueError(f"no task {task!r} in this model; it has {len(known)}, with ids from 0.")
        return int(task)

    @contextmanager
    def with_task(self, task: str | int | Sequence[str | int]) -> Generator[None]:
        """Inside the block every pass is of this task, by name or id; of a list, one for each row of the batch."""
        many = [task] if isinstance(task, str | int) else list(task)
        if not many:
            raise ValueError("with_task([]): give one task for each row of the batch.")
        ids = torch.tensor(
            [self.task_id(one) for one in many], device=_device(self.backbone, next(iter(self.mixtures)))
        )
        with self.under(replace(self._given, task_ids=ids, task_weights=None)):
            yield

    def routing_table(self) -> dict[str, Tensor]:
        """Site -> the weights of every task in evaluation, (tasks, experts) or (tasks, positions, experts)."""
        table: dict[str, Tensor] = {}
        for path, mixture in self.mixtures.items():
            router = mixture.router
            if isinstance(router, AbstractTaskRouter):
                with torch.no_grad():
                    table[path] = router.table().detach()
            else:
                table[path] = router.get_buffer("weights").expand(len(self.tasks), -1)
        return table

    def export_lora(self, task: str | int | None, folder: str | Path) -> Exported:
        """Write a task as an ordinary PEFT LoRA of rank r and alpha 1, with equal outputs: see `export_lora`.

        None is for a kind that knows no tasks. `mixwright experts add` takes the folder, and so do PEFT and vLLM.
        """
        return export_lora(self, of_task(self, task), Path(folder), str(task or self.composition.method))

    def fold_task(self, task: str | int | None) -> nn.Module:
        """A copy of the backbone whose weights act as this model does under a task; see `ComposedModel.fold`."""
        return self.fold(of_task(self, task))

    @property
    def settings(self) -> TensorPolyConfig:
        """The config that the model was composed with, or has grown to."""
        return decode(TensorPolyConfig, self.composition.config, where="composition.config")

    def grow_terms(self, num_latent: int, seed: int = 0) -> None:
        """More latent experts, in place, the same answers: see `growth.grow_terms`. Make a new optimiser afterwards."""
        from mixwright.methods.tensorpoly.growth import grow_terms

        grow_terms(self, num_latent, seed)

    def grow_router(self, tasks: Sequence[str] | None = None) -> None:
        """Weights per task for TLoRA or LoRA, in place, the same answers: see `growth.grow_router`."""
        from mixwright.methods.tensorpoly.growth import grow_router

        grow_router(self, tasks)

    def grow_order(self, to: str = "entangled", tolerance: float = 1e-6) -> float:
        """Weights per order position for TensorPoly-I, in place: see `growth.grow_order`."""
        from mixwright.methods.tensorpoly.growth import grow_order

        return grow_order(self, to, tolerance)

    def adapt(
        self, task: str, examples: "Examples", what: "What | Literal['auto'] | None" = None, **options: Any
    ) -> "Adaptation":
        """Learn one task more from few examples, in place, by `all`, its `router` row or the `experts`: see `adapt`.

        With "experts" and "all" the earlier tasks change too: save or export first what must stay. `options`: start,
        steps, learning_rate, router_learning_rate, folds, seed, tokenizer, labels, batch_size, max_length, quiet.
        """
        from mixwright.methods.tensorpoly.adapt import adapt

        return adapt(self, task, examples, what=what, **options)

    def remember(self, task: str, texts: "Texts", **options: Any) -> int:
        """Remember what texts of a task look like, for `with_similar`; saved with the model. See `similarity`."""
        from mixwright.methods.tensorpoly.similarity import remember

        return remember(self, task, texts, **options)

    def with_similar(self, inputs: "Inputs", **options: Any) -> AbstractContextManager["Likeness"]:
        """Inside the block each row is routed as the tasks that it resembles, uniformly where it resembles none.

        `inputs`: texts, or `input_ids` and `attention_mask`; the passes inside have the same rows. Yields the guess
        with its confidence. `tokenizer`, `temperature`, `threshold`: see `similarity.likeness`.
        """
        from mixwright.methods.tensorpoly.similarity import with_similar

        return with_similar(self, inputs, **options)

    def cost(self) -> Cost:
        """How many numbers are stored, trained, and merged for one task."""
        return count(self)


def _device(backbone: nn.Module, path: str) -> torch.device:
    return next(backbone.get_submodule(path).parameters()).device


def _common_divisors(sites: Iterable[Site]) -> list[int]:
    common = math.gcd(*(width for site in sites for width in (site.d_in, site.d_out)))
    return [heads for heads in range(1, common + 1) if common % heads == 0]


def _description(config: TensorPolyConfig, backbone: nn.Module) -> Composition:
    return Composition(
        method=METHOD.name,
        config=asdict(config),
        backbone={**provenance(backbone), "fingerprint": fingerprint(backbone)},
        citation=METHOD.paper.bibtex,
    )
