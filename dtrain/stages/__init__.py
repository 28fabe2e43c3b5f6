"""A stage of the chain: one training loop for every kind, method and engine."""
