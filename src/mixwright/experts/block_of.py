"""Which block of a backbone a parameter lies in, by its name alone: for plain torch models as for any library's."""

from collections.abc import Iterable

OUTSIDE = "outside"
"""Where parameters lie that are in no block: embeddings, final norms, a stem."""


def block_of(names: Iterable[str]) -> dict[str, str]:
    """Parameter -> block: the path to the member of the outermost list on its way, else `OUTSIDE`.

    A list is a path below which two numbers or more are found: of `encoder.layer.0.norm.weight` and
    `encoder.layer.1.norm.weight`, `encoder.layer`, whose members are blocks. So are the stages of a ConvNeXt, each
    residual block of torchvision's ResNets, and the layers of an `nn.Sequential`.
    """
    paths = {name: name.split(".")[:-1] for name in names}
    members: dict[str, set[str]] = {}
    for path in paths.values():
        for at in _numbers(path):
            members.setdefault(".".join(path[:at]), set()).add(path[at])
    found: dict[str, str] = {}
    for name, path in paths.items():
        inside = (at for at in _numbers(path) if len(members[".".join(path[:at])]) > 1)
        found[name] = next((".".join(path[: at + 1]) for at in inside), OUTSIDE)
    return found


def _numbers(path: list[str]) -> list[int]:
    return [at for at, part in enumerate(path) if part.isdecimal()]
