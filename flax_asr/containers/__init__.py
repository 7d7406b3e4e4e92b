"""Audio container formats: how long a file is, and whether it is whole."""
