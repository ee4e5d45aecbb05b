"""The self-check: a composition of one expert at weight 1 gives that expert's own output, or it is not built.

Adapters have been applied with a wrong scale, transposed, or in another's place, and nothing said so. Here each expert
is applied a second time by another path, straight from its factors as the catalogue has them (`expected`), and the two
are compared, at every site and through the whole model.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.inputs import example_inputs
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.errors import IncompatibleExpert
from mixwright.routing import Routing

WHOLE_MODEL = 16
"""Pools of at most this many experts are also checked through the whole model, one pass each."""

_TOKENS = 2
_AT_ONCE = 64


@runtime_checkable
class Factors(Protocol):
    """One expert at one site, as the catalogue holds it: `down` (rank, d_in), `up` (d_out, rank), `scale`."""

    @property
    def down(self) -> Tensor:
        """A."""
        ...

    @property
    def up(self) -> Tensor:
        """B."""
        ...

    @property
    def scale(self) -> float:
        """alpha / r, or its like."""
        ...


Pool = Mapping[str, Mapping[str, Factors]]


def self_check(model: ComposedModel, pool: Pool, inputs: Mapping[str, Any] | None = None) -> None:
    """Compare every expert of `model` with `pool` (expert id -> site -> factors), at its sites and in the whole model.

    `inputs` are keyword arguments for a pass of the whole model; without them they are made from its config, and where
    that is impossible only the sites are checked. On a mismatch the mixtures are taken out, so that the backbone is as
    it was, and IncompatibleExpert (SELFCHECK) is raised.
    """
    try:
        for site, mixture in model.mixtures.items():
            for start in range(0, len(pool), _AT_ONCE):
                _check_site(model, site, mixture, pool, list(pool)[start : start + _AT_ONCE])
        if len(pool) <= WHOLE_MODEL and model.probe.ran:
            given = example_inputs(model.backbone) if inputs is None else dict(inputs)
            for expert in pool if given is not None else ():
                _check_model(model, expert, pool[expert], given or {})
    except IncompatibleExpert:
        model.remove()
        raise


def expected(x: Tensor, factors: Factors | None, d_out: int) -> Tensor:
    """s B A x in float32 or wider, straight from the factors; zeros where the expert does not adapt the site."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if factors is None:
        return x.new_zeros((*x.shape[:-1], d_out), dtype=wide)
    down, up = factors.down.to(x.device, wide), factors.up.to(x.device, wide)
    return factors.scale * ((x.to(wide) @ down.T) @ up.T)


def _check_site(model: ComposedModel, site: str, mixture: Mixture, pool: Pool, experts: Sequence[str]) -> None:
    """The experts in one call in which row i is routed to the i-th; the mixture around them for the first of them."""
    weight = next(mixture.parameters())
    d_in = mixture.experts.get_parameter("down").shape[-1]
    x = torch.randn(1, _TOKENS, d_in, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    indices = torch.tensor([model.index(expert) for expert in experts], device=x.device)[:, None, None]
    routing = Routing(torch.ones(indices.shape, device=x.device), len(model.experts), indices)
    first = Routing(routing.weights[:1], len(model.experts), indices[:1])
    with torch.no_grad():
        own = mixture.experts(x.repeat(len(experts), 1, 1), routing, model.channel.condition)
        wanted = [expected(x[0], pool[expert].get(site), own.shape[-1]) for expert in experts]
        for row, expert in enumerate(experts):
            _compare(own[row], wanted[row], expert, f"its output at {site}")
        with model.routed_by(first):
            mixed = mixture(x)[0]
        base = 0.0 if mixture.base is None else mixture.base(x)[0]
        _compare(mixed, wanted[0] + base, experts[0], f"the mixture's output at {site}")


def _check_model(model: ComposedModel, expert: str, sites: Mapping[str, Factors], inputs: Mapping[str, Any]) -> None:
    with eval_mode(model):
        with model.only(expert):
            got = _tensors(model(**inputs))
        with model.disabled(), _plain_hooks(model, sites):
            wanted = _tensors(model(**inputs))
    for one, other in zip(got, wanted, strict=True):
        _compare(one, other, expert, "the whole model's output", slack=3.0)


@contextmanager
def _plain_hooks(model: ComposedModel, sites: Mapping[str, Factors]) -> Generator[None]:
    """The expert on the bare backbone by forward hooks: no mixture, no router, no stacked experts."""
    with ExitStack() as hooks:
        for site, mixture in model.mixtures.items():
            if site in sites and mixture.base is not None:
                hooks.callback(mixture.base.register_forward_hook(_adding(sites[site])).remove)
        yield


def _adding(factors: Factors) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del module
        return output + expected(args[0], factors, output.shape[-1]).to(output.dtype)

    return add


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model returned as its first result."""
    if isinstance(output, Tensor):
        return [output]
    values = list(output.values()) if isinstance(output, Mapping) else list(output)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _compare(got: Tensor, wanted: Tensor, expert: str, what: str, slack: float = 1.0) -> None:
    """Refuse unless ||got - wanted|| is small beside ||wanted||, as the dtype allows."""
    size = float(wanted.double().norm())
    error = float((got.double() - wanted.double()).norm())
    if not error <= slack * _tolerance(got.dtype) * size + 1e-9:
        raise IncompatibleExpert(
            "SELFCHECK",
            f'expert "{expert}"',
            f"{what} is not its own: off by {error:.3g} beside {size:.3g}. The composition was not built and the "
            "backbone is unchanged; please report this as a fault.",
        )


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 5e-3
    return {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 5e-3}.get(dtype, 3e-2)
