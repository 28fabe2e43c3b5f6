"""More rows from those there are, written by a model behind an OpenAI-style endpoint."""
