"""Training: takes functions, transformations and shardings; knows no model and no objective."""
