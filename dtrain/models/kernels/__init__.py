"""Exact layers that compute less, keep less and call less than those they stand for."""
