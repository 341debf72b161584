"""The native kernels, for the tests that are about them."""

from __future__ import annotations

import pytest

from redraft.kernels.library import CpuKernels, library


@pytest.fixture(scope="session")
def kernels() -> CpuKernels:
    found = library()
    if found is None:
        pytest.skip("NATIVE KERNELS WERE NOT BUILT: no C compiler at install, or no AVX2")
    return found
