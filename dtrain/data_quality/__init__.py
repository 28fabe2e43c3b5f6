"""What is in the data: checks of every row, a report of them, and cleaning by a policy."""
