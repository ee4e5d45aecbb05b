"""`doctor`: what this installation can do, and what is wrong with it."""

import os
import platform
import shutil
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from mixwright.evaluation.fitness import Fitness

_CORE = [
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "jaxtyping",
    "pydantic",
    "typer",
    "rich",
    "PyYAML",
]
_EXTRAS = {
    "data": "datasets",
    "eval": "lm_eval",
    "serve": "fastapi",
    "plot": "matplotlib",
    "gpu": "triton",
    "manticore": "greenlet",
    "vision": "PIL",
}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    lines = (
        "mixwright doctor",
        "mixwright doctor my-catalog --json",
        "mixwright doctor my-vit",
        "mixwright doctor --build",
    )
    app.command("doctor", rich_help_panel="Look around", epilog=example(*lines))(doctor)


def doctor(
    catalog: Annotated[
        str | None, typer.Argument(metavar="[CATALOG|MODEL]", help="A catalogue, whose experts to check, or a model.")
    ] = None,
    experts: Annotated[int, typer.Option("--experts", min=1, help="A model: sparse experts to count the cost of.")] = 8,
    build: Annotated[bool, typer.Option("--build", help="Compile the kernels now rather than on first use.")] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, which fast paths run here, and whether a catalogue is healthy; exit code 1 on trouble.

    Of a model, whether it is fit to have its weights chosen by few-shot examples: tied weights, norms, features, the
    same bits twice and either way weights are replaced, and the memory and time of a pool of sparse experts on it.
    """
    _require(catalog)
    model = _model(catalog, experts) if catalog and os.path.isfile(os.path.join(catalog, "config.json")) else None
    built, refused = _build() if build else (None, None)
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "free_disk_gib": round(
            shutil.disk_usage(catalog if catalog and os.path.isdir(catalog) else ".").free / 2**30, 1
        ),
        "packages": {name: _version(name) for name in ("mixwright", *_CORE)},
        "extras": {extra: find_spec(module) is not None for extra, module in _EXTRAS.items()},
        "torch": _torch(),
        "paths": _paths(),
        "built": built,
        "findings": _catalog(catalog) if catalog and model is None else None,
        "model": None if model is None else model.to_dict(),
    }
    troubles = [
        f"package {name} is missing: pip install mixwright" for name, has in report["packages"].items() if not has
    ]
    findings = [
        (one["level"], f"expert {one['expert']}: {one['code']} {one['message']}") for one in report["findings"] or ()
    ]
    troubles += [text for level, text in findings if level == "error"]
    troubles += [f"the kernels were not built: {refused}"] if refused else []
    troubles += [f"{one.name}: {one.text}" for one in model.findings if one.level == "bad"] if model else []
    report["warnings"] = [text for level, text in findings if level == "warning"]
    report["troubles"] = troubles
    if as_json:
        print_json(report)
    else:
        _print(report)
        if model is not None:
            _print_model(model)
    raise typer.Exit(1 if troubles else 0)


def _require(folder: str | None) -> None:
    """Raises ValueError for what is neither a catalogue nor a model."""
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder; give a catalogue's, or a model's, or leave it out.")
    if folder is not None and os.path.isfile(os.path.join(folder, "composition.yaml")):
        raise ValueError(f"{folder}: this is a composition; give the folder of the backbone that it stands on.")


def _model(folder: str, experts: int) -> "Fitness":
    from mixwright.backbones.hf import load_backbone
    from mixwright.evaluation.fitness import fitness

    return fitness(load_backbone(folder), experts=experts)


def _print_model(found: "Fitness") -> None:
    from mixwright.evaluation.fitness import cost_lines

    print_table(("looked at", "", "found"), [(one.name, one.level, one.text) for one in found.findings])
    print_table((f"{found.experts} sparse experts", "cost"), cost_lines(found))
    print(f"{found.architecture} ({found.library}) is {found.verdict} for few-shot adaptation.")


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        module = sys.modules.get(name)  # run from a source tree, without being installed
        return getattr(module, "__version__", None)


def _build() -> tuple[str | None, str | None]:
    """Compile the kernels: where they are, or why they are not."""
    if find_spec("torch") is None:
        return None, "torch is missing"
    from subprocess import SubprocessError

    from mixwright.ops import kernels

    try:
        return str(kernels.build()), None
    except (kernels.KernelUnavailable, OSError, SubprocessError) as reason:
        return None, str(reason)


def _torch() -> dict[str, Any] | None:
    if find_spec("torch") is None:
        return None
    import torch

    from mixwright.ops import kernels

    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "compiled kernels": kernels.status(),
        "grouped_mm": hasattr(torch.nn.functional, "grouped_mm"),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "bf16": torch.cuda.is_bf16_supported() if cuda else None,
    }


def _paths() -> dict[str, str]:
    """What dispatch picks at inference for a linear layer of 2048 x 2048, 36 experts of rank 16, two per token."""
    from mixwright.ops import kernels
    from mixwright.ops.cost import cheaper_one_by_one

    def path(tokens: int) -> str:
        return "one by one" if cheaper_one_by_one(tokens, 2, experts=36, rank=16, width=4096) else "grouped by expert"

    plain = {f"{tokens} tokens" if tokens > 1 else "1 token": path(tokens) for tokens in (1, 16, 512)}
    return {"float32, compiled": kernels.status(), **plain}


def _catalog(folder: str) -> list[dict[str, str]]:
    from dataclasses import asdict

    from mixwright.catalog.store import Catalog

    return [asdict(finding) for finding in Catalog(folder).check()]


def _print(report: dict[str, Any]) -> None:
    print_table(("package", "version"), [(name, found or "missing") for name, found in report["packages"].items()])
    advice = {False: "no: pip install 'mixwright[{}]'", True: "yes"}
    print_table(("extra", "installed"), [(name, advice[has].format(name)) for name, has in report["extras"].items()])
    facts = [(key, report[key]) for key in ("python", "machine")]
    facts.append(("free disk here", f"{report['free_disk_gib']} GiB"))
    facts += [(f"torch: {key}", value) for key, value in (report["torch"] or {}).items()]
    facts += [("kernels built", report["built"])] if report["built"] else []
    facts += [(f"dispatch of {key}", value) for key, value in report["paths"].items()]
    print_table(("fact", "value"), facts)
    print("\n".join([*report["warnings"], *(report["troubles"] or ["No trouble found."])]))
