"""Faults that are planted to see whether the campaigns find them; see `planted_faults`."""

from __future__ import annotations

import os
from pathlib import Path

PLANTED = "G2RL_FAULTS_PLANTED"
"""Environment variable: a file with Python code that changes what is loaded."""


def plant() -> None:
    """Change this process's copy of the code, where that is asked for."""
    if os.environ.get(PLANTED):
        exec(Path(os.environ[PLANTED]).read_text(), {})
