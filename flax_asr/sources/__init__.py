"""Where clips and sentences come from."""
