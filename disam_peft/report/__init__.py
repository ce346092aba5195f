"""Tables, figures and one self-contained page, rebuilt from the records of runs at any time. No torch."""

from disam_peft.report.page import Picture, build_report
from disam_peft.report.runs import RunRecord, read_runs
from disam_peft.report.tables import ComparisonTable, compare_held_out

__all__ = ["ComparisonTable", "Picture", "RunRecord", "build_report", "compare_held_out", "read_runs"]
