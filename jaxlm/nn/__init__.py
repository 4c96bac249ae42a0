"""Leaves for anyone's model: plain attributes, no model's config, nothing but jax and flax."""
