"""Task files in the language of ACES (arXiv 2406.19653), read and turned into MEDS labels."""

from mmjepa.ehr.tasks.label import label
from mmjepa.ehr.tasks.language import Task, read_task

__all__ = ["Task", "label", "read_task"]
