"""Models: found, loaded, quantized, given adapters, run on packed rows, saved."""
