"""From text to batches of token ids: sources, tokenizers, preparation, loading.

Everything slow happens once, in :func:`jaxlm.data.prepare.prepare`. Training reads what it wrote
through :mod:`jaxlm.data.loader`, and neither downloads nor tokenises.
"""
