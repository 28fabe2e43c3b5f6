"""The chain of stages: what is done already, what each artefact was made from."""
