"""Per-example gradients and representations from one forward and one backward pass a batch."""

from finetrace.collection.collect import Collector
from finetrace.collection.features import Features
from finetrace.collection.modules import Block, Tracked, track
from finetrace.collection.representations import Representation

__all__ = ["Block", "Collector", "Features", "Representation", "Tracked", "track"]
