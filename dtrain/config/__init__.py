"""The recipe: its schema, how it is read, what is checked across keys. No torch."""
