"""PEER: a feed-forward layer of up to a million single-neuron experts, found by product keys."""
