"""PEER: a feed-forward layer of up to a million single-neuron experts, found by product keys."""

from mixwright.methods.peer.config import METHOD, PeerConfig

__all__ = ["METHOD", "PeerConfig"]
