"""Tasks, batches, episodes, and synthetic tasks that need no download."""
