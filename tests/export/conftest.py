"""As in tests/loading: on the CPU on every machine."""

from tests.loading.conftest import on_cpu

__all__ = ["on_cpu"]
