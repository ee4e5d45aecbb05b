"""The tasks that a model was meta-trained on, as points, so that a new task can be told to be unlike them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

POINTS, DOMAINS, NAMES = "seen.points", "seen.domains", "seen.names"


@dataclass(frozen=True)
class Novelty:
    """`share`: of the remembered tasks, how many lie nearer to another remembered one than this task does to any.

    1 means farther out than any task of meta-training was from the rest. `distance`: to the nearest, of `domain`.
    """

    share: float
    distance: float
    domain: str

    def __str__(self) -> str:
        return f"novelty {self.share:.2f}: nearest to {self.domain}, at {self.distance:.3g}"


@dataclass(frozen=True)
class SeenTasks:
    """Task points (tasks, width), each the mean of a task's class prototypes, and the domain of each."""

    points: Float[Tensor, "tasks width"]
    domains: Int[Tensor, " tasks"]
    names: tuple[str, ...]

    @staticmethod
    def of(points: Sequence[Float[Tensor, " width"]], domains: Sequence[str]) -> "SeenTasks":
        """Points and, for each, the name of its domain. Raises ValueError for fewer than two."""
        if len(points) < 2:
            raise ValueError(f"{len(points)} task remembered; what is usual shows in two or more.")
        names = tuple(dict.fromkeys(domains))
        return SeenTasks(
            torch.stack([point.float().cpu() for point in points]),
            torch.tensor([names.index(domain) for domain in domains]),
            names,
        )

    @staticmethod
    def read(whole: Mapping[str, Tensor]) -> "SeenTasks | None":
        """What `tensors` wrote; None where nothing was."""
        if POINTS not in whole:
            return None
        return SeenTasks(whole[POINTS].cpu(), whole[DOMAINS].cpu(), tuple(words_in(whole[NAMES])))

    def tensors(self) -> dict[str, Tensor]:
        """For `ComposedModel.whole`."""
        return {POINTS: self.points, DOMAINS: self.domains, NAMES: as_tensor(self.names)}

    def novelty(self, point: Float[Tensor, " width"]) -> Novelty:
        """How unlike the remembered tasks one at `point` is."""
        distances = torch.cdist(point.float().cpu()[None], self.points)[0]
        nearest = int(distances.argmin())
        among = torch.cdist(self.points, self.points).fill_diagonal_(torch.inf).min(1).values
        share = float((among < distances[nearest]).double().mean())
        return Novelty(share, float(distances[nearest]), self.names[int(self.domains[nearest])])


def as_tensor(words: Iterable[str]) -> Tensor:
    """Words as numbers in a tensor, since files of tensors hold nothing else."""
    return torch.tensor(list(json.dumps(list(words)).encode()), dtype=torch.long)


def words_in(tensor: Tensor) -> list[str]:
    """What `as_tensor` wrote. Raises ValueError for anything else."""
    found = json.loads(bytes(tensor.cpu().tolist()))
    if not isinstance(found, list):
        raise ValueError("expected a list of words in a tensor.")
    return [str(word) for word in found]
