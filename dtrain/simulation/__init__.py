"""A training step with fake tensors and fake ranks, for `dtrain plan --exact`."""
