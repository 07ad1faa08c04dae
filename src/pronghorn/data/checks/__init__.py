"""What is wrong with files of rows: their JSON, their format, their characters, copies, and what tokens they become."""

from pronghorn.data.checks.report import FileFacts, Report
from pronghorn.data.checks.run import check

__all__ = ["FileFacts", "Report", "check"]
