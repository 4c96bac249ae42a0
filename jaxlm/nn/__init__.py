"""Leaves for anyone's model: plain attributes, no model's config, nothing but jax and flax.

The gradients of the leaves are hand-written and have no forward mode (``jax.jvp``, ``jacfwd``):
inside ``custom_vjp.plain()`` JAX differentiates the equations themselves.
"""
