"""Starts the workers: launchers, Slurm jobs, requeue policy. No torch."""
