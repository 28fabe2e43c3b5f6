"""From sources to micro-batches: read, template, tokenise, pack, store, order, load."""
