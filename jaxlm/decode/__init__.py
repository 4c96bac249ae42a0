"""From what a model gives to text."""
