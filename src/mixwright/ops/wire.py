"""What sharded tables of neurons send: bytes of one token, summed over all processes that send for it.

The number of experts N appears in the width of an index alone: four bytes up to 2^31 experts, eight beyond.
"""

from typing import Literal

WIDE = 4  # partial dots, what neurons say, gates, and sums by rows are float32


def wire_bytes(
    by: Literal["columns", "rows", "unpooled"],
    *,
    num_experts: int,
    width: int,
    k: int,
    parts: int,
    processes: int,
    itemsize: int = 2,
    backward: bool = False,
) -> dict[str, float]:
    """By what is sent: of the forward pass, or of the backward pass alone. Tokens and columns are evenly spread.

    `k`: experts of a token, over all heads. `itemsize`: of the layer's input. `columns` and `rows` are what
    `experts.sharded_table` does. `unpooled` is what a sharded embedding layer does: every retrieved row travels to its
    token, and its gradient back, in the type of the input. Besides, a forward pass sends eight bytes from each process
    to each other one, whatever the tokens: how many there are.
    """
    others, share = float(processes - 1), (processes - 1) / processes
    inputs = itemsize * width if parts > 1 else 0
    ids = 0 if backward else (4 if num_experts <= 1 << 31 else 8) * k
    if by == "columns":
        return {
            "indices": ids * others,
            "inputs": inputs * share,
            "partial dots": WIDE * k * (parts - 1) * others,
            "neurons' values": WIDE * k * others,
            "outputs": itemsize * width * share,
        }
    if by == "rows":
        return {
            "indices": ids * others,
            "inputs": inputs * others,
            "gates": WIDE * k * others,
            "outputs": WIDE * width * others,
        }
    return {"indices": ids * share, "rows": itemsize * parts * width * k * share}
