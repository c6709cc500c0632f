"""The report: one self-contained HTML page of a run, for a reader who was not there."""

from mmjepa.report.page import write_report

__all__ = ["write_report"]
