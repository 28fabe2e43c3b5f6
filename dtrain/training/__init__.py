"""Training one stage: the loop, its step, the learning rate, and stopping before preemption."""
