"""A trained pool on disk: the experts with their gates, a random-weight expert with its gate, a multitask adapter."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.side_by_side import Parts


@dataclass
class TrainedPool:
    """What one seed's training leaves behind; `parts.gates` has one row for each expert."""

    names: tuple[str, ...]
    parts: Parts
    noise: Parts
    multitask: Parts

    def save(self, path: Path) -> None:
        """One safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = {"experts": self.parts, "noise": self.noise, "multitask": self.multitask}
        tensors = {f"{kind}:{name}": t for kind, parts in kinds.items() for name, t in parts.state().items()}
        save_file(tensors, path, metadata={"names": ",".join(self.names)})

    @classmethod
    def load(cls, path: Path, names: tuple[str, ...]) -> "TrainedPool":
        """The inverse of `save`."""
        tensors = load_file(path)
        parts = [
            Parts.from_state({name.partition(":")[2]: t for name, t in tensors.items() if name.startswith(f"{kind}:")})
            for kind in ("experts", "noise", "multitask")
        ]
        return cls(names, *parts)


def stacked(parts: list[Parts]) -> Parts:
    """Experts trained one by one, stacked."""
    first = parts[0]
    return Parts(
        first.scale,
        {site: torch.cat([p.down[site] for p in parts]) for site in first.down},
        {site: torch.cat([p.up[site] for p in parts]) for site in first.up},
        {site: torch.cat([p.gates[site] for p in parts]) for site in first.gates},
    )


def random_weights(parts: Parts, seed: int) -> Parts:
    """One expert of noise: at every site normal entries with the root mean square of the real experts' entries."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(1, *like.shape[1:], generator=generator) * like.square().mean().sqrt()

    down = {site: noise(factor) for site, factor in parts.down.items()}
    return Parts(parts.scale, down, {site: noise(factor) for site, factor in parts.up.items()})
