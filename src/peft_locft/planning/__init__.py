"""What an edit will take: memory, operations, and the cards that have room for it."""

from .plan import Plan, plan_edit


__all__ = ["Plan", "plan_edit"]
