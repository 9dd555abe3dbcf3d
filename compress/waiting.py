"""How threads wait for each other at the end of what they compute together."""

from __future__ import annotations

import os
import sys

SPINS = "10000"  # some hundredths of a millisecond, more than threads wait for each other where each has a processor
TOLD = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_asleep() -> bool:
    """Let threads of torch that wait for others sleep soon, in this process and its children; whether that was set.

    By default libgomp has them spin for 300 000 turns. Where another process has one of the processors, the thread that
    is waited for then gets none, and each of the many small operations of a small network takes some milliseconds: a
    run of ten seconds takes four minutes. At libgomp's own choice for busy machines, 1 000, threads of a network whose
    operations take microseconds fall asleep between them even on a machine of its own, and it takes twice the time that
    it takes elsewhere. To be called before torch is loaded, as libgomp reads the variable once. Whoever set one of
    `TOLD` wants it otherwise: nothing is changed.
    """
    if "torch" in sys.modules or any(name in os.environ for name in TOLD):
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True
