"""What every floor leans on: errors, files, hashes, units, the log. No torch."""
