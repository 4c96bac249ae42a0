"""Language models pretrained by filling in text, then adapted cheaply, in plain JAX."""

__version__ = "0.1.0"
