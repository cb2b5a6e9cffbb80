"""What makes the embedded base, RLIF's control study and the step benches: in the checkout, not in the wheel."""

import subprocess
from pathlib import Path


def commit() -> str:
    """Of the code that runs, or "unknown"."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
