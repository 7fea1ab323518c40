"""Methods that LoGo is compared with: other ways to select adapters, behind one interface."""

from logo.baselines.method import Answering, Learned, Method, Prepared, Task
from logo.baselines.registry import get_method

__all__ = ["Answering", "Learned", "Method", "Prepared", "Task", "get_method"]
