"""Generate more rows from existing ones with a model behind an OpenAI-compatible endpoint."""
