"""Every operation by every back end of this machine."""

import pytest

from everlong.ops import backends, use_backend


@pytest.fixture(autouse=True, params=[name for name in backends() if name != "native"])
def backend(request):
    """Eager, and what `auto` takes: the native one where a compiler is to be had."""
    with use_backend(request.param):
        yield request.param
