"""What the training commands share."""
