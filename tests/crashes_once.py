"""A program for two processes, the second of which ends by a signal when it runs the first time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

marker, folder = map(Path, sys.argv[1:])
if os.environ["RANK"] == "1" and not marker.exists():
    marker.touch()
    (folder / "half-written").touch()
    os.kill(os.getpid(), signal.SIGKILL)
print(sorted(os.listdir(folder)))
