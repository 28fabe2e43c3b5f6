"""Starting the workers, and telling by what they were started. No torch."""
