"""Tasks: how records become batches, a head, an objective, metrics and answers; one a file."""
