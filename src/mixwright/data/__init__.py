"""Text with what is wanted of it, from files and hubs to batches."""
