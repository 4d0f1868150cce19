"""Eight forced CPU devices for every test, and one cache of compiled programs for all of them.

Both must be set before JAX starts; the workers of pytest-xdist and the processes that tests
start inherit them.
"""

import atexit
import gc
import os
import shutil
import tempfile

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dstee_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Tracing makes millions of small objects that stay: Python looks for cycles less often.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Each compiled program takes memory maps, of which Linux gives a process 65,530."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Programs are compiled quickly (tests/quick.py), and as users do in what is `optimized`.

    Those are the tests and modules marked so, but for tests marked `optimized(False)`; and every
    process that a test starts without `quick.environment`.
    """
    from tests import quick

    marker = request.node.get_closest_marker("optimized")
    with quick.compilation(marker is None or marker.args == (False,)):
        yield
