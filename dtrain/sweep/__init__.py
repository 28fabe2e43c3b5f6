"""Many runs of one recipe, to find its best settings."""
