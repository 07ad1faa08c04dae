# pronghorn on PyTorch's own CUDA image; docs/installing.md says how to build and run it.
# The base is what the GPU figures of this repository were measured with.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

# Triton compiles its launchers with a C compiler and Python's headers when a kernel first runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The image's Python may be the distribution's, which pip leaves alone unless told that this is the place.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1

ARG EXTRAS=gpu,gguf,serve
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
# The base's torch satisfies what is asked for and stays as it is.
RUN python -m pip install "/src[${EXTRAS}]" && rm -rf /src

# Any user may run it (--user): caches and work belong to no one in particular, and names stand for unknown numbers.
RUN mkdir -p /cache /work && chmod 1777 /cache /work
ENV HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton USER=pronghorn LOGNAME=pronghorn
WORKDIR /work
USER 1000:1000
CMD ["pronghorn", "doctor"]
