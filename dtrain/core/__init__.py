"""Shared foundation: errors, files, hashes, locks, run folders, units and messages; no torch."""
