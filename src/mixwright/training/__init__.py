"""One loop for every stage of every method; it knows stages, batches and checkpoints, and no method."""
