"""Routers that stand around a product-key router and change what becomes of its retrieval."""

from mixwright.routers.base import WideBuffers
from mixwright.routers.product_key import GateName, ProductKeyRouter
from mixwright.routers.retriever import AbstractRetriever


class AbstractAround(WideBuffers, AbstractRetriever):
    """Has a plain `router` inside, and its sizes, whatever it grows to."""

    def __init__(self, router: ProductKeyRouter) -> None:
        super().__init__()
        if router.gate != "softmax":
            raise ValueError(
                f"{type(self).__name__}: coverage is the share of the softmax that was retrieved, and this router's "
                f"gates are {router.gate!r}; compose with gate='softmax'."
            )
        self.router = router

    @property
    def grid(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]  (the grid may grow)
        """Sub-keys on the two axes."""
        return self.router.grid

    @property
    def num_experts(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  (the grid may grow)
        """Experts of the grid."""
        return self.router.num_experts

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  (the plain router's)
        """Queries of a token."""
        return self.router.heads

    @property
    def top_k(self) -> int:
        """Experts of a head, plainly retrieved."""
        return self.router.top_k

    @property
    def dim_key(self) -> int:
        """The width of a head's query."""
        return self.router.dim_key

    @property
    def gate(self) -> GateName:
        """Softmax."""
        return self.router.gate
