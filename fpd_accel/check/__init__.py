"""What a person should see of a dataset before training on it: ``fpd-accel check``."""

from fpd_accel.check.labels import Finding, Labels, read_labels
from fpd_accel.check.proof import Lost, Proof
from fpd_accel.check.report import Report, check_shards, show_report, write_json
from fpd_accel.check.sheet import choose_people, contact_sheet

__all__ = [
    "Finding",
    "Labels",
    "Lost",
    "Proof",
    "Report",
    "check_shards",
    "choose_people",
    "contact_sheet",
    "read_labels",
    "show_report",
    "write_json",
]
