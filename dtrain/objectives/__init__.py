"""What a stage minimizes: one file for each family of objectives."""
