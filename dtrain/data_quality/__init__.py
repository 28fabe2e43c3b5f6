"""Scan rows for quality problems, personal data and leaks, and clean them by a policy."""
