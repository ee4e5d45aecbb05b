"""One folder per paper; the folder listing is the registry."""
