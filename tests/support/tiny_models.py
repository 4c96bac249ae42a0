"""The BERT of tests: small, without dropout. Change what the claim needs, and no more."""

from jaxlm.models.bert import BertConfig

BERT = BertConfig(
    vocab_size=32,
    num_layers=2,
    hidden_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=8,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
)
