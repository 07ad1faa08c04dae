"""Benchmarks: the same training job through several libraries, each in its own process.

python -m benchmarks.verify                        numerical parity: no speed is worth a claim before this is green
python -m benchmarks.run --workload llama8b-lora   one table: tokens/s, memory, ratio to Unsloth's default
python -m benchmarks.kernels                       every kernel alone, against torch and the memory roofline
python -m benchmarks.profile --workload …          where a step's time goes
"""
