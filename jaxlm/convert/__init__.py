"""Published weights in, and ours out: numpy alone, one table of names for each architecture."""
