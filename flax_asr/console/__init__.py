"""What people and programs read while a command runs."""
