"""What a finished student is worth."""
