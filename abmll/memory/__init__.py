"""Memory of a run, counted on fake tensors before anything is loaded: every byte by phase, component and maker."""

from abmll.memory.plan import Plan, Remedy, plan_run, remedies

__all__ = ["Plan", "Remedy", "plan_run", "remedies"]
