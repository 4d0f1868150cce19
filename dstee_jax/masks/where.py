"""Which leaves are sparse."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name

# Words that the name of a leaf ends in, or begins with, if it is no kernel.
_TABLES = {"embed", "embeds", "embedding", "embeddings", "embedder", "emb", "embs", "posemb"}
_TABLES |= {"token", "tokens", "table", "tables", "wte", "wpe"}
_VECTORS = {"bias", "biases", "scale", "scales", "offset", "gamma", "beta", "cls", "probe"}
_BEGINNINGS = {"bias", "b", "g", "pos", "position", "positional", "rel", "relative"}
# Words in the name of the layer whose 'weight' is no kernel.
_NORMS = {"norm", "norms", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "ln", "bn", "gn"}
_SAY_NOTHING = {"layer", "param", "parameter"}


def kernels(path: Any, leaf: Any) -> bool:
    """The default of `where`: kernels of dense, convolution, recurrent and attention layers.

    True for floating arrays of 2 dimensions and more, unless the last part of their path says
    that they are none. A part is read as words (`tok_embed`, `TokenEmbed_0` and `tokenEmbed` as
    token, embed), without numbers, and none is found inside another: `upscale_conv/kernel` and
    `patch_embedding/kernel` are kernels. These stay dense:

    * names that end in bias, scale, offset, gamma, beta; embed, embedding(s), embedder, emb,
      posemb; token(s), table; wte, wpe, cls or probe: Linen's and NNX's `embedding`, Haiku's
      `embeddings`, `pos_embed`, `cls_token`, `relative_position_bias_table`;
    * names that begin with bias, b, g, pos, position, positional, rel or relative: `b_q`,
      `rel_pos_h`; g is the gain of weight normalisation;
    * arrays called `weight`, as Equinox and PyTorch call those of all layers, if the layer's
      name ends as a table's does and the array has 2 dimensions (`tok_embed/weight`, but not
      `patch_embed/weight`), or has the word norm(s), layernorm, rmsnorm, batchnorm, groupnorm, ln,
      bn or gn in it (`ln_f/weight` of stacked layers).

    Names decide, so look at the end of `dstee.summary(opt_state, params)`, which lists what
    stayed dense, and correct it where they mislead, as where a linear layer is called
    `time_embed`, or to keep the output layer dense:

        where=lambda path, leaf: "head" not in str(path) and dstee.kernels(path, leaf)

    Args:
      path: key path of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
      leaf: array or `jax.ShapeDtypeStruct`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"patch_embed": {"kernel": jnp.ones((16, 8))}, "pos_embed": jnp.ones((1, 9, 8))}
      >>> jax.tree_util.tree_map_with_path(kernels, params)
      {'patch_embed': {'kernel': True}, 'pos_embed': False}
    """
    if getattr(leaf, "ndim", 0) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    parts = [_words(part) for part in re.split(r"[/.]", path_name(path))]
    parts = [words for words in parts if words]
    if len(parts) > 1 and parts[-1] == ["value"]:  # of an NNX Variable
        parts.pop()
    layer, name = [[""], [""], *parts][-2:]
    if name == ["weight"]:
        table = layer[-1] in _TABLES and "patch" not in layer and leaf.ndim == 2
        return not table and not _NORMS.intersection(layer)
    return name[-1] not in _TABLES | _VECTORS and name[0] not in _BEGINNINGS


def selected(params: PyTree, where: Callable[[Any, Any], bool]) -> list[int]:
    """Indices of the leaves that `where` selects; a ValueError if there is none."""
    pairs = [pair for pair in leaves_with_path(params) if not is_dense(pair[1])]
    found = [i for i, (path, leaf) in enumerate(pairs) if where(path, leaf)]
    if not found:
        names = [path_name(path) for path, _ in pairs]
        raise ValueError(f"where selects none of {names}: make it True for at least one.")
    return found


def _words(part: str) -> list[str]:
    """'TokenEmbed_0' as ['token', 'embed']; 'b_Q' as ['b', 'Q'], since B and b are two names."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)
    words = [word if len(word) == 1 else word.lower() for word in words]
    return [word for word in words if word not in _SAY_NOTHING]
