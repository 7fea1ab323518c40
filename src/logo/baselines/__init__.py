"""Methods that LoGo is compared with: other ways to select adapters, behind one interface."""

from logo.baselines import arrow, best_single, fixed, lorahub, loraretriever, target
from logo.baselines.method import Method, Prepared, Task, get_method, get_methods, register_method

__all__ = ["Method", "Prepared", "Task", "get_method", "get_methods", "register_method"]
_REGISTERED = (fixed, target, best_single, lorahub, loraretriever, arrow)  # by being imported
