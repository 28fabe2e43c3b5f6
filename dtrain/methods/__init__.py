"""Fine-tuning methods: one module a family, behind the protocol of `base.Method`."""
