"""TensorPoly: latent experts that are rank terms of tensor products, chosen per task and trained together."""

from mixwright.methods.tensorpoly.config import METHOD, TensorPolyConfig

__all__ = ["METHOD", "TensorPolyConfig"]
