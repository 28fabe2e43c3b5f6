"""Terms against forgetting that a stage adds to the loss of its objective."""
