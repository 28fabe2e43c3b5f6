"""Using the result: list adapters, write server commands, generate text and chat."""
