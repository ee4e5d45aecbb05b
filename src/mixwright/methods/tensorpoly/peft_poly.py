"""Adapters that PEFT's Poly trained, Poly and MHR alike, become models of ours with equal outputs, and go back to PEFT.

PEFT keeps A as (heads, experts, d_in / heads, rank), B as (heads, experts, rank, d_out / heads), and the logits of a
task as one row, head after head.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from mixwright.backbones.hf import provenance
from mixwright.catalog.admission import same_model
from mixwright.catalog.card import CONFIG, WEIGHTS
from mixwright.catalog.document import render
from mixwright.catalog.hub import locate
from mixwright.catalog.refusal import Faults, quote, refuse
from mixwright.composition.model import ComposedModel, Composition
from mixwright.errors import IncompatibleExpert
from mixwright.experts.poly import PolyExperts
from mixwright.files import staged_folder, write_new
from mixwright.methods.tensorpoly.config import METHOD, TensorPolyConfig
from mixwright.methods.tensorpoly.model import TaskComposedModel, pool
from mixwright.methods.tensorpoly.peft_poly_file import LOGITS, A, B, PolyAdapter, read_poly
from mixwright.methods.tensorpoly.stored import restore
from mixwright.routers.task import TaskLogits
from mixwright.sites import Site, linear_sites


def from_peft_poly(
    folder: str | Path,
    backbone: nn.Module,
    tasks: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    noise: bool = True,
    confirm_base: bool = False,
) -> TaskComposedModel:
    """The model that PEFT makes of a Poly adapter (a folder or a hub id), with equal outputs in evaluation.

    `tasks` names the rows of its router, in order; without names they are task-0, task-1, ... In training PEFT always
    draws noise; `noise=False` goes on without. `confirm_base`: the base model it names is this backbone, under another
    name. Raises CatalogError for what is not honoured, IncompatibleExpert for another backbone, ValueError for names
    that are not as many as the tasks; the backbone is then as it was.
    """
    path, origin = locate(folder, revision, None)
    where = f"adapter {quote(origin.name.rsplit('/', 1)[-1])}"
    adapter = read_poly(path, where)
    known = provenance(backbone)
    _check_backbone(adapter, linear_sites(backbone), where)
    if adapter.base_model and known["path"] and not same_model(adapter.base_model, known["path"]) and not confirm_base:
        found = f"its configuration names {quote(adapter.base_model)}, this backbone is {quote(known['path'])}"
        raise refuse("BASE", where, f"{found}. If both are the same weights, confirm it (confirm_base=True).")
    config = _config(adapter, tasks, noise)
    state: dict[str, Tensor] = {}
    for site, (a, b, logits) in adapter.sites.items():
        state[f"{site}.experts.down"] = a.permute(1, 3, 0, 2).flatten(2).contiguous()
        state[f"{site}.experts.up"] = b.permute(1, 2, 0, 3).flatten(2).contiguous()
        by_head = logits.unflatten(1, (adapter.num_splits, adapter.num_skills))
        state[f"{site}.router.logits"] = by_head if adapter.num_splits > 1 else logits
    model = restore(config, backbone, state, pool(config))
    model.composition = Composition(
        method=METHOD.name,
        config=asdict(config),
        backbone={**known, "fingerprint": model.fingerprint},
        citation=METHOD.paper.bibtex,
    )
    return model


def export_peft_poly(model: ComposedModel, folder: str | Path) -> None:
    """Write a model of Poly or MHR experts as a folder that PEFT's Poly opens, with equal outputs in evaluation.

    Raises ValueError for other experts or routers, for layers that PEFT's Poly does not know (Conv1D) and for routing
    that it does not have, CatalogError (PATH) for a folder that is in use.
    """
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for path, mixture in model.mixtures.items():
        experts, router = mixture.experts, mixture.router
        if not isinstance(experts, PolyExperts) or not isinstance(router, TaskLogits):
            raise ValueError(
                f"{path} holds no Poly or MHR experts with learned task routing; PEFT's Poly knows no other."
            )
        if router.straight_through or not isinstance(mixture.base, nn.Linear):
            what = "rounded routing" if router.straight_through else "a layer of another kind than nn.Linear"
            raise ValueError(f"{path} has {what}, which PEFT's Poly does not know; export its tasks as LoRAs instead.")
        heads, skills = experts.heads, experts.num_experts
        down = experts.down.unflatten(2, (heads, -1)).permute(2, 0, 3, 1)
        up = experts.up.unflatten(2, (heads, -1)).permute(2, 0, 1, 3)
        parts = {A: down, B: up, LOGITS: router.logits.flatten(1)}
        tensors |= {f"base_model.model.{path}.{name}": _plain(tensor) for name, tensor in parts.items()}
        counts = {"r": experts.rank, "n_tasks": router.num_tasks, "n_skills": skills, "n_splits": heads}
    config = {
        **counts,
        "base_model_name_or_path": model.composition.backbone.get("path") or None,
        "inference_mode": True,
        "init_weights": True,
        "modules_to_save": None,
        "peft_type": "POLY",
        "poly_type": "poly",
        "target_modules": sorted(model.mixtures),
        "task_type": None,
    }
    with staged_folder(Path(folder)) as staging:
        write_new(staging / CONFIG, render(config))
        write_new(staging / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def _config(adapter: PolyAdapter, tasks: Sequence[str] | None, noise: bool) -> TensorPolyConfig:
    names = tuple(f"task-{i}" for i in range(adapter.num_tasks)) if tasks is None else tuple(tasks)
    if len(names) != adapter.num_tasks:
        raise ValueError(
            f"{len(names)} names for {adapter.num_tasks} tasks; give one for each row of its router, in order."
        )
    config = TensorPolyConfig(
        tasks=names,
        experts="poly" if adapter.num_splits == 1 else "mhr",
        target_modules=tuple(adapter.sites),
        rank=adapter.rank,
        num_latent=adapter.num_skills,
        heads=adapter.num_splits,
        noise=noise,
    )
    return config.settled()


def _check_backbone(adapter: PolyAdapter, sites: dict[str, Site], where: str) -> None:
    """Every layer of the adapter is one of the backbone, and every layer that it targets has its tensors."""
    faults = Faults(where, IncompatibleExpert)
    for path, (a, b, _) in adapter.sites.items():
        theirs = (a.shape[0] * a.shape[2], b.shape[0] * b.shape[3])
        if path not in sites:
            faults.add("TENSOR", f"{quote(path)} is no linear layer of this backbone.")
        elif sites[path].transposed:
            faults.add("TENSOR", f"{quote(path)} is a Conv1D here, and PEFT's Poly adapts linear layers only.")
        elif theirs != (sites[path].d_in, sites[path].d_out):
            ours = f"{sites[path].d_in} -> {sites[path].d_out}"
            faults.add("SHAPE", f"{quote(path)} maps {ours} here; the adapter is for {theirs[0]} -> {theirs[1]}.")
    missing = [path for path in sites if path not in adapter.sites and adapter.adapts(path)]
    if missing:
        found = f"{len(missing)} layers that target_modules names have no tensors, the first is {quote(missing[0])}."
        faults.add("INCOMPLETE", f"{found} Half an adapter is not used; save it again.")
    faults.check()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone().contiguous()
