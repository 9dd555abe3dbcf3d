"""The packaged example: a small network trained on the handwritten digits, its file, and the options of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHECKPOINT = Path(__file__).with_name("digits.safetensors")

DEMO_OPTIONS: dict[str, Any] = {
    "checkpoint": str(CHECKPOINT),
    "data": "digits",
    "eval": "digits?train=false",
    "tolerance": 0.1,
}

__all__ = ["CHECKPOINT", "DEMO_OPTIONS"]
