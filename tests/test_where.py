"""Which leaves the default `where` takes: by name, and in models of the four libraries."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import dstee_jax as dstee
from dstee_jax.trees import leaves_with_path, path_name

KEY = jax.random.key(0)


def tree(name, leaf):
    """One leaf in dicts, by its name with slashes."""
    for part in reversed(name.split("/")):
        leaf = {part: leaf}
    return leaf


def chosen(params):
    """The names of the leaves that `kernels` takes, and of those of 2 dimensions that it leaves."""
    taken, left = set(), set()
    for path, leaf in leaves_with_path(params):
        if dstee.kernels(path, leaf):
            taken.add(path_name(path))
        elif leaf.ndim > 1:
            left.add(path_name(path))
    return taken, left


def takes(name, shape=(16, 8), dtype=jnp.float32):
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    ((path, _),) = jax.tree_util.tree_leaves_with_path(tree(name, leaf))
    return dstee.kernels(path, leaf)


@pytest.mark.parametrize(
    "name",
    [
        "upscale_conv/kernel",
        "multiscale_attn/query/kernel",
        "patch_embedding/kernel",
        "patch_embed/proj/kernel",
        "patch_embed/proj/weight",
        "patch_embed/weight",
        "embeddings/patch_embeddings/projection/kernel",
        "embedding/kernel",
        "scaled_dense/kernel",
        "unembed/kernel",
        "unembed/weight",
        "debias/w",
        "tokenizer/layers/0/weight",
        "token_mixing/Dense_0/kernel",
        "time_embed/layers/0/weight",
        "embed_dropout/linear/weight",
        "beta_head/kernel",
        "relative_attention/kernel",
        "mlp/gating_einsum",
        "attention/query_w",
        "gru/weight_ih",
        "lora/lora_a",
        "lora/lora_b",
        "ssm/B",
        "W_Q",
        "kernel",
        "weight",
        "3",
        "normalizer/kernel",
        "conv_norm_free/linear/weight",
        "encoder/layer/0/attention/weight",
    ],
)
def test_kernels(name):
    assert takes(name)


@pytest.mark.parametrize(
    "name",
    [
        "pos_embed",
        "cls_token",
        "mask_token",
        "register_tokens",
        "tok_embed/weight",
        "pos_embedding",
        "posemb",
        "position_embeddings",
        "rel_pos_h",
        "pos_enc",
        "relative_position_bias_table",
        "Embed_0/embedding",
        "embedding",
        "decoder/embed/embeddings",
        "transformer.wte.weight",
        "transformer/wpe/weight",
        "embeddings/word_embeddings/weight",
        "model/embed_tokens/weight",
        "embedder_block/token_embedder/weight",
        "point_embeddings/0/weight",
        "TokenEmbedding_0/weight",
        "CLSToken",
        "embedding_layer/weight",
        "cls",
        "MAPHead_0/probe",
        "attention/query/bias",
        "b_Q",
        "lstm/bias_ih_l0",
        "r_w_bias",
        "blocks/ln/scale",
        "blocks/layer_norm/offset",
        "blocks/gamma",
        "layer_scale_parameter",
        "blocks/ln_f/weight",
        "blocks/norm1/weight",
        "LayerNorm_0/weight",
        "weight_normed/g",
        "Embed_0/embedding/value",
    ],
)
def test_what_is_no_kernel(name):
    assert not takes(name)


def test_shapes_and_types_that_are_no_kernels():
    assert not takes("kernel", (8,))
    assert not takes("kernel", ())
    assert not takes("kernel", (16, 8), jnp.int32)
    assert takes("patch_embed/weight", (8, 3, 16, 16))
    assert takes("stem_embed/weight", (8, 3, 16, 16))
    assert not takes("stem_embed/weight", (8, 3))
    leaf = jnp.ones((4, 4))
    assert dstee.kernels((), leaf)
    assert not dstee.kernels((), 1.0)


def test_an_nnx_model():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.embedding = nnx.Embed(10, 8, rngs=rngs)
            self.cls_token = nnx.Param(jnp.ones((1, 1, 8)))
            self.patch_embedding = nnx.Conv(3, 8, (2, 2), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.upscale = nnx.ConvTranspose(8, 8, (2, 2), rngs=rngs)
            self.cell = nnx.GRUCell(8, 8, rngs=rngs)
            self.unembed = nnx.Linear(8, 10, rngs=rngs)

    params = nnx.state(Block(nnx.Rngs(0)), nnx.Param)
    taken, left = chosen(params)
    attention = {f"attention/{name}" for name in ("query", "key", "value", "out")}
    layers = attention | {"patch_embedding", "upscale", "unembed"}
    cell = {name for name in taken if name.startswith("cell/")}
    assert cell
    assert taken - cell == {f"{layer}/kernel" for layer in layers}
    biases = {f"{layer}/bias" for layer in attention - {"attention/out"}}
    assert left == {"embedding/embedding", "cls_token"} | biases


def test_a_linen_model():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(10, 8)(tokens)
            x = x + self.param("pos_embedding", linen.initializers.normal(), (1, 5, 8))
            x = linen.MultiHeadDotProductAttention(2)(x)
            x = linen.LayerNorm()(linen.Conv(8, (3,), name="multiscale_conv")(x))
            return linen.Dense(10, name="unembed")(x)

    params = Model().init(KEY, jnp.ones((2, 5), int))["params"]
    taken, left = chosen(params)
    attention = "MultiHeadDotProductAttention_0"
    layers = {f"{attention}/{name}" for name in ("query", "key", "value", "out")}
    assert taken == {f"{layer}/kernel" for layer in layers | {"multiscale_conv", "unembed"}}
    biases = {f"{attention}/{name}/bias" for name in ("query", "key", "value")}
    assert left == {"Embed_0/embedding", "pos_embedding"} | biases


def test_an_equinox_model():
    class Model(eqx.Module):
        tok_embed: eqx.nn.Embedding
        pos_embed: jax.Array
        patch_embed: eqx.nn.Conv2d
        attention: eqx.nn.MultiheadAttention
        norms: list
        ln: eqx.nn.LayerNorm
        cell: eqx.nn.GRUCell
        mlp: eqx.nn.MLP

    keys = jax.random.split(KEY, 3)
    model = Model(
        eqx.nn.Embedding(10, 8, key=KEY),
        jnp.ones((5, 8)),
        eqx.nn.Conv2d(3, 8, 2, key=KEY),
        eqx.nn.MultiheadAttention(2, 8, key=KEY),
        [eqx.nn.LayerNorm((4, 4))],
        eqx.filter_vmap(lambda key: eqx.nn.LayerNorm(8))(keys),  # stacked for a scan
        eqx.nn.GRUCell(8, 8, key=KEY),
        eqx.nn.MLP(8, 8, 16, 1, key=KEY),
    )
    taken, left = chosen(eqx.filter(model, eqx.is_inexact_array))
    attention = {f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")}
    rest = {"patch_embed/weight", "cell/weight_ih", "cell/weight_hh"}
    assert taken == attention | rest | {"mlp/layers/0/weight", "mlp/layers/1/weight"}
    dense = {"tok_embed/weight", "pos_embed", "patch_embed/bias", "ln/weight", "ln/bias"}
    assert left == dense | {"norms/0/weight", "norms/0/bias"}


def test_haiku_names():
    params = {
        "vi_t/~/embed": {"embeddings": jnp.ones((10, 8))},
        "vi_t": {"positional_embeddings": jnp.ones((5, 8)), "cls_token": jnp.ones((1, 8))},
        "vi_t/~/patch_embed": {"w": jnp.ones((2, 2, 3, 8)), "b": jnp.ones(8)},
        "vi_t/__layer_stack/linear": {"w": jnp.ones((3, 8, 8)), "b": jnp.ones((3, 8))},
        "vi_t/__layer_stack/layer_norm": {"scale": jnp.ones((3, 8)), "offset": jnp.ones((3, 8))},
    }
    taken, left = chosen(params)
    assert taken == {"vi_t/~/patch_embed/w", "vi_t/__layer_stack/linear/w"}
    assert len(left) == 6


def test_density_is_that_of_all_matrices():
    shapes = {
        "upscale_conv/kernel": (3, 3, 8, 16),
        "multiscale_attn/kernel": (32, 32),
        "patch_embedding/kernel": (48, 32),
    }
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    params |= {"pos_embed": jnp.ones((16, 32)), "tok_embed/weight": jnp.ones((10, 32))}
    tx = dstee.transform(optax.sgd(0.1), sparsity=0.9, total_steps=200, key=KEY)
    state = tx.init(params)
    dense = {name for name, mask in state.masks.items() if mask == optax.MaskedNode()}
    assert dense == {"pos_embed", "tok_embed/weight"}
    active = sum(int(state.masks[name].sum()) for name in shapes)
    assert active == pytest.approx(0.1 * sum(params[name].size for name in shapes), abs=2)
