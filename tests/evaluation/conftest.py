"""Fixtures of this folder."""

from decoding_cases import build  # noqa: F401
