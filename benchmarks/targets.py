"""Accelerators to compile for, without having one: TPU slices and H100s.

    mesh = mesh_of("tpu:v5e:4x4")

needs the extra `compile`. Nothing can be run on these devices, only compiled for them. Import this
before jax is used: it keeps jax on the CPU.
"""

import importlib.util
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

jax.config.update("jax_platforms", "cpu")
# Read when libtpu is loaded: there is no metadata server to ask, and a second process is no fault.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# NVIDIA H100 SXM5, from its data sheet and the CUDA programming guide: a GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NEEDS = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda12"}
EXAMPLES = "tpu:v5e:4x4 (v4:2x2x1, v6e:16x16, ...), gpu:h100 or gpu:h100x8"


def is_installed(platform: str) -> bool:
    """Whether the compiler for 'tpu' or 'gpu' is there."""
    package, _, rest = NEEDS[platform].partition(".")
    try:
        return importlib.util.find_spec(NEEDS[platform] if rest else package) is not None
    except ModuleNotFoundError:
        return False


def devices_of(target: str) -> list:
    """The devices of a target, as `tpu:v5e:4x4` or `gpu:h100x8`.

    Raises:
      ValueError: there is no such target.
      ModuleNotFoundError: its compiler is not installed.
    """
    gpu = re.fullmatch(r"gpu:h100(?:x(\d+))?", target)
    tpu = re.fullmatch(r"tpu:(v\w+:\d+x\d+(?:x\d+)?)", target)
    if not gpu and not tpu:
        raise ValueError(f"target {target!r} is unknown: pass one as {EXAMPLES}.")
    platform = "gpu" if gpu else "tpu"
    if not is_installed(platform):
        raise ModuleNotFoundError(
            f"{target} needs a compiler that is not here: pip install -e '.[compile]'."
        )
    if gpu:
        many = f"1x1x{gpu.group(1) or 1}"
        return topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology=many
        ).devices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=tpu.group(1)).devices
    except Exception as error:  # the runtime's own, of no public type
        text = str(error).splitlines()[0]
        raise ValueError(f"target {target!r} is no TPU slice: {text}. As {EXAMPLES}.") from error


def mesh_of(target: str, shape: tuple[int, ...] = (-1,), names: tuple[str, ...] = ("data",)):
    """A mesh of the target's devices, or of as many as `shape` takes; Auto axes."""
    devices = np.array(devices_of(target))
    if -1 not in shape:
        devices = devices[: np.prod(shape)]
    return Mesh(devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
