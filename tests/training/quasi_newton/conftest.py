"""What the tests of both optimizers share."""

import pytest

from sequential_optimizer import LBFGS, SSBroyden


@pytest.fixture(params=[LBFGS, SSBroyden])
def make(request):
    """Makes one of the two optimizers."""
    return request.param
