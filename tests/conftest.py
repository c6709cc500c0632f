"""Shared fixtures. One thread: several threads of tiny matrix products are slower, and far slower on a busy machine."""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The optional folder of small real data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MMJEPA_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the optional real-data folder (MMJEPA_DATA) is absent")
    return folder
