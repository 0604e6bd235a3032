"""The tiny encoders."""

from pathlib import Path

import pytest

import torchtitan_flux


@pytest.fixture(scope="session")
def tiny() -> Path:
    """torchtitan_flux/assets/tiny."""
    return Path(torchtitan_flux.__file__).parent / "assets" / "tiny"
