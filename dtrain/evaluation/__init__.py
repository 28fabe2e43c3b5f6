"""What is measured of a model in its engine in addition to held-out losses, and the gates."""
