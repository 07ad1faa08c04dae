"""What every run leaves in its output_dir: `run.json` for programs, `report.html` for people."""

from pronghorn.training.report.recorder import REPORT, RunRecorder

__all__ = ["REPORT", "RunRecorder"]
