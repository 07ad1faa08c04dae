"""Scripts and notebooks written for Unsloth, run on this library: `pronghorn run script.py` and
`import pronghorn.compat.unsloth`. The only place that answers to other libraries' names, and only when asked to."""
