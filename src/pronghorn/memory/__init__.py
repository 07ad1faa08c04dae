"""Where kept activations live. (What is kept is decided by the save levels in `blocks`.)"""

from pronghorn.memory.offload import HostStash

__all__ = ["HostStash"]
