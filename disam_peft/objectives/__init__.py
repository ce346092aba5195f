"""What a step descends."""
