"""Tests mirror src/. A package so that `from tests.tiny import tiny_model` works from any test."""
