"""What an audio file says of its own length."""
