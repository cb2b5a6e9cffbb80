"""What a run will take, before it takes it: memory by stage and kind, disk, time; what to change if it does not fit."""

from .plan import Plan, make_plan, refuse, resolve_auto
from .show import advice, as_json, as_table

__all__ = ["Plan", "advice", "as_json", "as_table", "make_plan", "refuse", "resolve_auto"]
