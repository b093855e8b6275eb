"""What an index will cost, before it is built: exact counts, a model of the cost of a pass, a few measured batches."""

from finetrace.planning.cost import Shape
from finetrace.planning.counts import Piece, Work, pieces_of
from finetrace.planning.extrapolation import measure_plan
from finetrace.planning.plan import Plan, plan_index

__all__ = ["Piece", "Plan", "Shape", "Work", "measure_plan", "pieces_of", "plan_index"]
