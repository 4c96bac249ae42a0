"""BERT-style encoders in pure JAX: masked language modelling, LoRA and full fine-tuning."""

__version__ = "0.1.0"
