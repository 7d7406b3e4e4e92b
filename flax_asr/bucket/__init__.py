"""Run folders, data and models in an object store."""
