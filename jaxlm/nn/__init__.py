"""Leaves for anyone's model: plain attributes, no model's config enters, nothing but jax and flax."""
