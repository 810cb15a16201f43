"""What holds for every test."""

import torch


def pytest_runtest_setup() -> None:
    """The same random numbers for a test whatever ran before it, so that it fails alone where it fails among others."""
    torch.manual_seed(0)
