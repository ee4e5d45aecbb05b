"""What a step changes in a model beside its parameters, and what a training loop cannot keep."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from mixwright.experts.sharded_table import AbstractShardedTable


def moving_buffers(model: nn.Module, trained: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """Buffers that a step may change: of modules with a parameter in training, and of those that pool statistics."""
    ids = {id(parameter) for parameter in trained}
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, module in model.named_modules()
        if hasattr(module, "accumulate") or any(id(p) in ids for p in module.parameters(recurse=False))
        for name, buffer in module.named_buffers(recurse=False)
    }


def pooling(model: nn.Module) -> dict[nn.Module, int]:
    """Modules that pool statistics over the micro-batches of a step, and over how many now (`QueryNorm`)."""
    return {module: cast(int, module.accumulate) for module in model.modules() if hasattr(module, "accumulate")}


def pool_over(passes: Mapping[nn.Module, int]) -> None:
    """Let each of these modules pool over so many passes."""
    for module, count in passes.items():
        module.accumulate = cast(Any, count)


def following(model: nn.Module) -> list[nn.Module]:
    """Modules that change with the share of the training that is done, such as a temperature that falls."""
    return [module for module in model.modules() if hasattr(type(module), "progress")]


def tell_progress(modules: Iterable[nn.Module], share: float) -> None:
    """Let each of these modules know it. A function of the step alone, so that a resumed run goes on alike."""
    for module in modules:
        module.progress = cast(Any, share)


def settling(model: nn.Module) -> list[nn.Module]:
    """Modules that put something right after every step of the optimisers: bounds, or what is to stay as it was."""
    return [module for module in model.modules() if hasattr(type(module), "after_step")]


def refuse_sharded(model: nn.Module, trained: Iterable[nn.Parameter], stage: str) -> None:
    """Raises ValueError where a table that is spread over processes would be trained."""
    ids = {id(parameter) for parameter in trained}
    for name, module in model.named_modules():
        if isinstance(module, AbstractShardedTable) and any(id(p) in ids for p in module.parameters()):
            raise ValueError(
                f"stage {stage}: {name} is a table spread over processes; this loop keeps whole checkpoints on one. "
                "Train it with a loop of your own, or unshard(model) first."
            )
