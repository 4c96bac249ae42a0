"""Sweeps: which fields vary, a process for each trial, successive halving, and the table."""
