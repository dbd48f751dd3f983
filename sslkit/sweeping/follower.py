"""`python -m sslkit.sweeping.follower PID MODULE ...`: becomes `python -m MODULE ...`, asked to end when PID dies.

What the system is told about a parent's death outlives `exec`, so the run is an ordinary one. No torch.
"""

from __future__ import annotations

import os
import sys

from sslkit.stopping import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
