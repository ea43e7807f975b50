"""`python -m unicoder_vl_hf.cli`, as `accelerate launch -m` wants it."""

import sys

from .parser import main

if __name__ == "__main__":
    sys.exit(main())
