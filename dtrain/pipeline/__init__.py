"""The chain of stages: which are complete, and what each artifact was built from."""
