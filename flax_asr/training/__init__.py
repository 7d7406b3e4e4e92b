"""The parts of a training run, which `loop.py` puts in order."""
