"""Programs compiled quickly, for tests compile more than they run.

Without LLVM's optimisations and, where jaxlib has such options, with XLA's older code generator of
fusions and one LLVM module a program: in a quarter of the time. XLA's passes are the same.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 has all compiled as users do.
"""

import contextlib
import functools
import os
from unittest import mock

import jax
from jax._src import compiler  # no public setting holds for all programs of a process

SETTING = "jax_disable_most_optimizations"
WANTED = os.environ.get(SETTING.upper(), "1") != "0"


@functools.cache
def options():
    """Those of XLA that this jaxlib knows."""
    asked = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    known = {}
    for name, value in asked.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            known[name] = value
    return known


@contextlib.contextmanager
def compilation(quick):
    """Within it, programs of this process are compiled quickly or, by `quick`, as users do."""
    quick = quick and WANTED
    overrides = options() if quick else {}
    plain = compiler.get_compile_options

    def get_compile_options(*args, env_options_overrides=None, **kwargs):
        chosen = overrides | (env_options_overrides or {})
        return plain(*args, env_options_overrides=chosen, **kwargs)

    before = jax.config.read(SETTING)
    jax.config.update(SETTING, quick)
    try:
        with mock.patch.object(compiler, "get_compile_options", get_compile_options):
            yield
    finally:
        jax.config.update(SETTING, before)


def environment(devices=8):
    """Of a process with so many CPU devices that compiles quickly."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    flags += [f"--{name}={value}".lower() for name, value in options().items()] if WANTED else []
    return os.environ | {SETTING.upper(): f"{WANTED:d}", "XLA_FLAGS": " ".join(flags)}
