"""`pliant ...` in this process, which has paid for its imports.

tests/cli/test_app.py tests the real program, with its pipes, terminals and signals.
"""

from __future__ import annotations

import io
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess

from pliant.cli import app


def pliant(*words: str, cwd: Path) -> CompletedProcess[str]:
    """Its exit code, and what it prints."""
    with (
        chdir(cwd),
        redirect_stdout(io.StringIO()) as printed,
        redirect_stderr(io.StringIO()) as errors,
    ):
        code = app.outcome(list(words))
    return CompletedProcess(words, code, printed.getvalue(), errors.getvalue())
