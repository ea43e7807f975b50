"""Runs `unicoder-vl` as `python -m unicoder_vl_hf.cli`, which `accelerate launch -m` needs."""

import sys

from .parser import main

if __name__ == "__main__":
    sys.exit(main())
