"""`python train.py ARGS` is `flax-asr train ARGS`."""

import sys

from flax_asr import __main__

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(__main__.command())
