"""FLOPs read from jaxprs, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import dstee_jax as dstee

X = jax.ShapeDtypeStruct((1, 8), jnp.float32)
W = jnp.ones((8, 8))
QUARTER = jnp.arange(64).reshape(8, 8) < 16


def scanned(p, x):
    return jax.lax.scan(lambda c, w: (jax.nn.relu(c @ w), None), x, p["w"])[0]


@jax.custom_vjp
def doubled(x, w):
    return 2 * x @ w


doubled.defvjp(lambda x, w: (doubled(x, w), (x, w)), lambda res, g: res)
CASES = {
    "matmul": (lambda p, x: x @ p["w"], W, 64),
    "transposed, cast, masked": (lambda p, x: x @ (p["w"].T * QUARTER).astype(jnp.bfloat16), W, 64),
    "jit": (jax.jit(lambda p, x: x @ p["w"]), W, 64),
    "remat": (jax.checkpoint(lambda p, x: jnp.sin(x @ p["w"])), W, 64),
    "custom_vjp": (lambda p, x: doubled(x, p["w"]), W, 64),
    "vmap": (lambda p, x: jax.vmap(lambda row: row @ p["w"])(jnp.ones((5, 8)) * x), W, 5 * 64),
    "scan over the leaf": (scanned, jnp.ones((3, 8, 8)), 3 * 64),
    "scan with a nested carry": (
        lambda p, x: jax.lax.scan(
            lambda c, _: ((c[1] @ p["w"], c[0] + 1, {"a": c[2]["a"] * 2}), c[0]),
            (x, x, {"a": x}),
            None,
            length=3,
        )[0],
        W,
        3 * 64,
    ),
    "scan with the leaf": (
        lambda p, x: jax.lax.scan(lambda c, _: (c @ p["w"], None), x, None, length=7)[0],
        W,
        7 * 64,
    ),
    "fori_loop": (lambda p, x: jax.lax.fori_loop(0, 4, lambda i, c: c @ p["w"], x), W, 4 * 64),
    "the dearest branch": (
        lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: x, x),
        W,
        64,
    ),
    "looked up by data": (lambda p, x: x @ p["w"][x[0].astype(int) % 8], W, 64),
    "switched": (lambda p, x: x @ jnp.where(x[0] > 0, p["w"], 0), W, 64),
    "weight standardisation": (
        lambda p, x: x @ ((p["w"] - p["w"].mean(0)) / p["w"].std(0) * jnp.ones(8)),
        W,
        64,
    ),
    "inputs closed over": (lambda p, x: jnp.ones((1, 8)) @ p["w"], W, 64),
    "one-hot of a constant": (lambda p, x: jnp.eye(8)[x[0, :1].astype(int)] @ p["w"], W, 64),
    "experts": (
        lambda p, x: jax.lax.ragged_dot(jnp.ones((5, 8)) * x, p["w"], jnp.array([1, 2, 2])),
        jnp.ones((3, 8, 8)),
        5 * 64,
    ),
    "einsum over heads": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(8, 2, 4)),
        W,
        64,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_products_belong_to_their_leaf(case):
    apply, w, macs = CASES[case]
    mask = jnp.broadcast_to(QUARTER, w.shape)
    got = dstee.flops(apply, {"w": w}, X, masks={"w": mask})
    assert got == dstee.Flops(2 * macs, macs // 2, {"w": (2 * macs, macs // 2)}, 0)


def test_products_of_data_and_of_weights_are_nobodys():
    def attention(p, x):
        q = x @ (p["down"] @ p["up"])  # a product of weights: 8 * 2 * 8
        return jax.nn.softmax(q @ x.T) @ x  # 2 * 8, of data

    got = dstee.flops(attention, {"down": jnp.ones((8, 2)), "up": jnp.ones((2, 8))}, X)
    assert got.leaves == {}
    assert got.other == got.dense == got.sparse == 2 * (128 + 64 + 8 + 8)


def test_a_scale_times_a_kernel_is_the_kernels():
    def apply(p, x):
        return x @ (p["kernel"] * p["gain"])

    got = dstee.flops(apply, {"gain": jnp.ones(8), "kernel": W}, X)
    assert got.leaves == {"kernel": (128, 128)}


def test_a_transformer_with_embeddings():
    """Embedding, attention of 2 heads, linear: the masks reach every kernel."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(50, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
            self.head = nnx.Linear(8, 50, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            return self.head(x + self.attention(x))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    apply = lambda p, ids: nnx.merge(graph, p, rest)(ids)  # noqa: E731
    tx = dstee.transform(optax.sgd(0.1), sparsity=0.5, total_steps=200, key=jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    got = dstee.flops(apply, params, ids, masks=tx.init(params))
    kernels = 5 * (4 * 8 * 8 + 8 * 50)
    assert got.other == 2 * 2 * 5 * 5 * 8  # scores and sums of attention
    assert got.dense == 2 * kernels + got.other
    assert abs(got.sparse - got.other - kernels) < 0.01 * kernels
    assert len(got.leaves) == 5


def test_products_of_embeddings_are_data():
    def apply(p, ids):
        rows = p["embed"][ids]  # (8, 4)
        return (rows @ rows.T) @ p["w"]  # 8 * 8 * 4, then 8 * 64 for w

    params = {"embed": jnp.ones((30, 4)), "w": W}
    got = dstee.flops(
        apply,
        params,
        jax.ShapeDtypeStruct((8,), jnp.int32),
        masks={"embed": optax.MaskedNode(), "w": QUARTER},
    )
    assert got == dstee.Flops(512 + 1024, 512 + 256, {"w": (1024, 256)}, 512)


def test_concatenated_kernels_share_by_size():
    params = {"q": jnp.ones((8, 16)), "k": jnp.ones((8, 4)), "v": jnp.ones((8, 4))}

    def apply(p, x):
        return x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)

    got = dstee.flops(apply, params, X)
    assert {k: v[0] for k, v in got.leaves.items()} == {"q": 256, "k": 64, "v": 64}
    stacked = lambda p, x: scanned({"w": jnp.stack([p["a"], p["b"]])}, x)  # noqa: E731
    assert dstee.flops(stacked, {"a": W, "b": W}, X).leaves == {"a": (128, 128), "b": (128, 128)}


def test_shard_map_over_some_axes_counts_those():
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("d")
    apply = jax.shard_map(
        lambda p, x: x @ p["w"],
        mesh=mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=spec,
        axis_names={"d"},
    )
    assert dstee.flops(apply, {"w": W}, jnp.ones((8, 8))).dense == 2 * 8 * 64


def test_kernels_that_cannot_be_read_are_said():
    from jax.experimental import pallas as pl

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    def apply(p, x):
        out = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        return pl.pallas_call(kernel, out_shape=out, interpret=True)(x, p["w"])

    with pytest.warns(UserWarning, match="Pallas kernel is not counted"):
        assert dstee.flops(apply, {"w": W}, jnp.ones((8, 8))).dense == 0


@pytest.mark.parametrize(
    ("options", "macs"),
    [
        ({}, 8 * 8 * 3 * 3 * 4 * 6),
        ({"strides": 2}, 4 * 4 * 3 * 3 * 4 * 6),
        ({"feature_group_count": 2}, 8 * 8 * 3 * 3 * 2 * 6),
        ({"padding": "VALID"}, 6 * 6 * 3 * 3 * 4 * 6),
    ],
)
def test_convolutions(options, macs):
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
    graph, params = nnx.split(conv)
    got = dstee.flops(lambda p, x: nnx.merge(graph, p)(x), params, jnp.ones((1, 8, 8, 4)))
    assert got.leaves == {"kernel": (2 * macs, 2 * macs)}


def test_transposed_convolution_counts_what_it_meets():
    conv = nnx.ConvTranspose(4, 6, (2, 2), strides=(2, 2), rngs=nnx.Rngs(0))
    graph, params = nnx.split(conv)
    got = dstee.flops(lambda p, x: nnx.merge(graph, p)(x), params, jnp.ones((1, 5, 5, 4)))
    assert got.dense == 2 * 5 * 5 * 2 * 2 * 4 * 6


def test_gradients_cost_two_forward_passes():
    loss = lambda p, x: ((jax.nn.relu(x @ p["a"]) @ p["b"]) ** 2).sum()  # noqa: E731
    params = {"a": W, "b": W}
    forward = dstee.flops(loss, params, X).dense
    both = dstee.flops(jax.value_and_grad(loss, argnums=(0, 1)), params, X).dense
    assert both == 3 * forward


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")
    apply = jax.shard_map(
        lambda p, x: x @ p["w"], mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec
    )
    got = dstee.flops(apply, {"w": W}, jnp.ones((8, 8)))
    assert got.leaves == {"w": (2 * 8 * 64,) * 2}


def test_an_optimizer_state_gives_the_masks():
    params = {"kernel": jnp.ones((16, 10)), "bias": jnp.ones(10)}
    tx = dstee.transform(optax.sgd(0.1), sparsity=0.9, total_steps=1000, key=jax.random.key(0))
    apply = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731
    got = dstee.flops(apply, params, jnp.ones((1, 16)), masks=tx.init(params))
    assert (got.dense, got.sparse) == (320, 32)


def test_unknown_number_of_iterations_is_said():
    def apply(p, x):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ p["w"], x)

    with pytest.warns(UserWarning, match="counted once"):
        assert dstee.flops(apply, {"w": W}, X).leaves == {"w": (128, 128)}


def test_traced_masks_are_refused():
    with pytest.raises(ValueError, match="masks= must be concrete"):
        jax.jit(lambda m: dstee.flops(CASES["matmul"][0], {"w": W}, X, masks={"w": m}))(QUARTER)


def test_training_flops():
    assert dstee.training_flops(100, 100) == 300
    assert dstee.training_flops(100, 20) == 60
    assert dstee.training_flops(100, 20, every=0) == 140
    np.testing.assert_allclose(dstee.training_flops(100, 20, every=99), (60 * 99 + 140) / 100)
    with pytest.raises(ValueError, match="every=-1 must be 0 or more"):
        dstee.training_flops(1, 1, every=-1)
