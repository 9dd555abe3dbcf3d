"""Many models in one go: each in a process of its own, with a journal, resume, and a summary at the end."""

from __future__ import annotations

from compress.zoo.plan import Shard, ZooPlan, plan_zoo
from compress.zoo.runner import run_zoo

__all__ = ["Shard", "ZooPlan", "plan_zoo", "run_zoo"]
