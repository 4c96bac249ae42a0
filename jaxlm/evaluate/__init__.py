"""How good a fine-tuned model is, and where it fails: metrics, tags and spans, plots."""
