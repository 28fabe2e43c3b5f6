"""A training step without memory: fake tensors and fake ranks, for `dtrain plan --exact`."""
