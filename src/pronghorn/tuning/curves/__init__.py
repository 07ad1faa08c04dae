"""What a run's curves say: overfitting, divergence, spikes and their rows, plateaus, in sentences with numbers."""

from pronghorn.tuning.curves.finding import KINDS, Finding, Kind
from pronghorn.tuning.curves.history import Curve, History
from pronghorn.tuning.curves.jumps import outstanding_steps
from pronghorn.tuning.curves.reader import read_curves

__all__ = ["KINDS", "Curve", "Finding", "History", "Kind", "outstanding_steps", "read_curves"]
