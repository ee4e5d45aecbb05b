"""What a model costs: counted in `evaluation.task_cost`, for every model routed by task."""

from mixwright.evaluation.task_cost import Cost, count

__all__ = ["Cost", "count"]
