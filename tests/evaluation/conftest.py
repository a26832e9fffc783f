from decoding_cases import build  # noqa: F401
