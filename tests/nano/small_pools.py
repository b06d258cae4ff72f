"""The program of `pliant.nano.train` with pools as small as in its tests."""

from __future__ import annotations

import sys

from pliant.nano.train import trainer
from pliant.nano.train.__main__ import main

if __name__ == "__main__":
    trainer._POOL = 512
    main(sys.argv[1:])
