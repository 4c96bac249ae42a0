"""What is learned: ``make_loss(apply, …)`` gives ``loss(variables, batch, key, …)``."""
