"""Data preparation and loading: read, render, tokenize, pack, store, order, batch."""
