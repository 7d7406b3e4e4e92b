"""The wav2vec 2.0 encoder family in flax.linen, and the ways in and out of its parameters."""
