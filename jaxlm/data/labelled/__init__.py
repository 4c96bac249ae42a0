"""From labelled records to batches: records, labels, splits, encoding by task, batches.

Every task's file reads its examples from records and encodes them into
:class:`jaxlm.data.labelled.examples.Examples`, which :mod:`jaxlm.data.labelled.batches` draws from.
"""
