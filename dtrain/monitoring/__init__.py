"""What a run says of itself: metrics line by line, curves, a report and a summary."""
