"""A run put together from its configuration: the one driver, its folder, and reading it."""
