"""Pretrained models as mixwright sees them."""
