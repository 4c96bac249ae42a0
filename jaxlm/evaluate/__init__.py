"""How good a tuned model is, and where it fails: metrics, decoding of tags and spans, pictures."""
