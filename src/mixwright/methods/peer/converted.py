"""A feed-forward layer as a PEER layer: its hidden neurons are the experts."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixwright.experts.neuron import NeuronExperts
from mixwright.experts.table import NeuronTable
from mixwright.methods.peer.key_fit import start_keys
from mixwright.methods.peer.neurons import Neurons
from mixwright.ops.grid_layout import grid_layout, near_square
from mixwright.routers.product_key import GateName, ProductKeyRouter


def converted(
    neurons: Neurons,
    *,
    top_k: int | None = None,
    grid: tuple[int, int] | None = None,
    dim_key: int = 64,
    gate: GateName = "one",
    alike: Float[Tensor, "experts features"] | None = None,
    seed: int = 0,
) -> tuple[ProductKeyRouter, NeuronExperts, Int[Tensor, " experts"]]:
    """A router and experts, and the place of each neuron: expert `places[e]` is neuron e.

    With `top_k` None every neuron is retrieved, and with gate `one` the output is the layer's own. `grid`: near-square
    unless given; cells beyond the neurons are ablated and hold zeros. Neurons whose rows of `alike` (their rows in
    unless given) point the same way share a row or a column of the grid. There is one head, because two could both
    count a neuron. Raises ValueError for a grid with too few cells.
    """
    cells = near_square(len(neurons)) if grid is None else grid
    count = cells[0] * cells[1]
    if count < len(neurons):
        raise ValueError(
            f"grid={cells[0]} x {cells[1]} has {count} cells for {len(neurons)} neurons; choose "
            f"{' x '.join(map(str, near_square(len(neurons))))}, or leave it out."
        )
    vectors = neurons.rows[:, -2] if alike is None else alike
    places = grid_layout(vectors.float(), cells, torch.Generator().manual_seed(seed))
    placed = neurons.arranged(places, count)
    router = ProductKeyRouter(
        neurons.width,
        cells,
        heads=1,
        top_k=min(top_k or len(neurons), len(neurons)),
        dim_key=dim_key,
        gate=gate,
        query_norm="none",
        query_bias=True,
    ).to(neurons.rows.device)
    if count > len(neurons):
        router.ablated = torch.ones(count, dtype=torch.bool, device=places.device)
        router.ablated[places] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start_keys(router, placed)
    experts = NeuronExperts(NeuronTable(placed.rows, placed.bias), neurons.activation, out_bias=placed.out_bias)
    return router, experts, places
