"""Where kept activations live. (What is kept is decided by the save levels in `blocks`.)"""

from pronghorn.memory.offload import HostStash
from pronghorn.memory.pool import HostPool, available_host_bytes

__all__ = ["HostPool", "HostStash", "available_host_bytes"]
