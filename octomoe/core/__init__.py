"""What a number is. torch only."""
