"""Pages made from scores and routing statistics."""
