"""What is measured of a model in its engine besides held-out losses, and the gates."""
