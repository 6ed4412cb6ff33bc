"""From logits to a loss: log-probabilities, losses and implicit rewards. Torch only, plain arguments."""
