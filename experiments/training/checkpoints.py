"""Orbax checkpoints of a run, with notes as JSON."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dstee_jax.trees import path_name

# Replicas share the saving of arrays of 1 MiB and more. Of each shape they save slices, one
# program for each device: for small arrays, compiling them is most of the first save.
_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)  # not a warning that this overrides a handler
ocp.type_handlers.register_type_handler(
    jax.Array,
    ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20),
    override=True,
)
logging.set_verbosity(_verbosity)


class Checkpoints:
    """The last two checkpoints of a run.

    A checkpoint is renamed into place when it is complete: a process that is killed while it
    writes leaves the one before as the last.
    """

    def __init__(self, directory: Path, *, keep: bool):
        """Open a directory; without `keep`, what an earlier run left in it is removed."""
        path = directory.resolve() / "checkpoints"
        if not keep and path.exists() and jax.process_index() == 0:
            shutil.rmtree(path)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        handlers = {"state": ocp.StandardCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The step of the last checkpoint, None without one."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, notes: Any) -> None:
        """Save a pytree of arrays and, beside it, what JSON holds; done when it returns."""
        save = ocp.args
        self.manager.save(
            step, args=save.Composite(state=save.StandardSave(state), notes=save.JsonSave(notes))
        )

    def restore(self, like: Any) -> tuple[Any, Any]:
        """The last state, as `like` in shapes, dtypes and shardings, and its notes."""
        load = ocp.args
        items = load.Composite(state=load.StandardRestore(like), notes=load.JsonRestore())
        loaded = self.manager.restore(self.latest(), args=items)
        return jax.tree.map(_raw, loaded["state"]), loaded["notes"]

    def restore_plain(self) -> dict[str, Any]:
        """The last state as nested dicts of arrays on one device, whatever devices saved it.

        Raises:
          FileNotFoundError: there is no checkpoint.
        """
        if self.latest() is None:
            raise FileNotFoundError(f"no checkpoint under {self.manager.directory}.")
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        saved = self.manager.item_metadata(self.latest())["state"]
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), saved)
        return self.restore(like)[0]


def by_name(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of `Checkpoints.restore_plain` by their paths, as 'layers/0/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path).removesuffix("/value"): np.asarray(x) for path, x in leaves}


def _raw(x: Any) -> Any:
    """The data of a typed PRNG key, which checkpoints from before 0.2 hold; else x itself."""
    typed = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if typed else x
