"""Models: found, loaded, quantised, given adapters, run on packed rows, saved."""
