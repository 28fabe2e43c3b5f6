"""Ranks, their devices and the few collectives that dtrain itself calls."""
