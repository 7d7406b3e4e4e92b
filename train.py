"""`python train.py ARGS` is `flax-asr train ARGS`."""

import sys

from flax_asr import __main__

if __name__ == "__main__":
    sys.exit(__main__.main(["train", *sys.argv[1:]]))
