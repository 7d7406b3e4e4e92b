"""The parts of the training loop, `loop.py`."""
