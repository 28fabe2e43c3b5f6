"""From a model's config.json to memory, time and bytes on the wire, without torch."""
