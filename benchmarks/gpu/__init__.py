"""Everything that needs a GPU, in one command of at most eight minutes.

    python -m benchmarks.gpu --out FOLDER
    python -m benchmarks.gpu --out FOLDER --dry-run     # the same on a CPU, at tiny sizes

`rows` lists what is run, the most valuable first, and `runner` runs it within the time. The rows
themselves: `engines` and `scorer` check that bf16 on CUDA computes what it should; `steps`,
`generation` and `prefixes` measure times and memory beside a control. `models` builds their models.

It needs torch, transformers, peft, accelerate and numpy, and runs from a plain checkout.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if importlib.util.find_spec("pliant") is None:
    sys.path.insert(0, str(ROOT / "src"))
