"""What tests cannot show with the oldest packages that are promised (`.github/oldest.txt`), each with its reason."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, oldest: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test where an older version of the package is installed."""
    older = Version(version(package)) < Version(oldest)
    return pytest.mark.skipif(older, reason=f"needs {package} {oldest} or newer: {reason}")


DRAWS = needs("torch", "2.7", "a CPU draws other exponentials and dropout masks from the same seed")
SHARDS = needs("torch", "2.6", "--parallel fsdp")
OPTIONAL_CHECKSUMS = needs("torch", "2.6", "torch.save always writes checksums")
SAVED_UINT16 = needs("torch", "2.6", "torch.save refuses uint16")
SCALES = needs("torch", "2.7", "the type float8_e8m0fnu")
STORED_UINT16 = needs("safetensors", "0.6", "save_file refuses uint16")
STORED_COMPLEX = needs("safetensors", "0.7", "save_file refuses complex numbers")
SIMULATED_GPU = needs("torch", "2.14", "fake CUDA tensors ask for a driver")
