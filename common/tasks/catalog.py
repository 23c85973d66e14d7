"""The tasks by the name they have in the run config."""

from common.tasks.causal_lm import CAUSAL_LM
from common.tasks.classification import CLASSIFICATION
from common.tasks.task import Task

TASKS: dict[str, Task] = {"classification": CLASSIFICATION, "causal_lm": CAUSAL_LM}
