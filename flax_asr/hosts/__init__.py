"""A run on several machines: joining, agreeing, stopping."""
