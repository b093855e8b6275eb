"""The paper's analyses: why influence functions fail, or do not (arXiv 2409.19998, section 4)."""

from finetrace.studies.study import Outcome, Setting, Study

__all__ = ["Outcome", "Setting", "Study"]
