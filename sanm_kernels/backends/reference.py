"""Adapter of the reference: its kernels are registered where the operators are defined."""


def load() -> None:
    """Nothing to load: plain torch runs everywhere."""
