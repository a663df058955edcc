"""What tells something about a detector, or about the loss."""
