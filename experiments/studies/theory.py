"""The paper's two propositions on a problem that satisfies their assumptions.

    python -m experiments.studies.theory

F(W) = 1/2 <W - W*, A (W - W*)> with a positive definite A is L-smooth, L the largest eigenvalue;
Gaussian noise of variance sigma^2 is added to its gradient. DST-EE trains it with plain SGD, a
run of its own for each number of rounds Q with the learning rate of Proposition 2,
alpha = 1 / (16 L dT sqrt(Q)). Prints, and appends to results/theory.jsonl,

* the mean over rounds of |grad F(W * M)|^2 for each Q, the floor that the masks leave
  (measured in a run that is long enough to stand still), and the slope of what is above it
  against Q in log-log: -1/2 is the bound, at least as steep passes;
* Proposition 1: in each round the measured decrease of F beside the right-hand side of Eq. 4,
  and in what share of the rounds it holds.

About a minute on 2 CPU cores.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import dstee_jax as dstee
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one
from experiments.training.progress import conclude, over

SHAPE = (8, 16)
DELTA_T = 4
SPARSITY, DROP_FRACTION, C = 0.5, 0.1, 1e-2
SIGMA = 0.5  # of the gradient noise: E|noise|^2 = SIGMA^2
ROUNDS = (4096, 16384, 65536, 262144)
SEEDS = 4


class Problem(NamedTuple):
    """A quadratic."""

    curvature: jax.Array  # A, (n, n), eigenvalues in [0.5, 1]
    best: jax.Array  # W*, (n,)

    def loss(self, w: jax.Array) -> jax.Array:
        gap = w.reshape(-1) - self.best
        return 0.5 * gap @ self.curvature @ gap

    def gradient(self, w: jax.Array) -> jax.Array:
        return (self.curvature @ (w.reshape(-1) - self.best)).reshape(w.shape)


class Trace(NamedTuple):
    """What each round of a run left; arrays (rounds,)."""

    loss: jax.Array  # F(W), before the round
    gradient: jax.Array  # |grad F(W)|^2, before the round
    masked_gradient: jax.Array  # |grad F(W * M)|^2, with the round's mask
    size: jax.Array  # |W|^2
    error: jax.Array  # |W * M - W|^2


def make_problem(seed: int = 0) -> Problem:
    """Random eigenvectors, eigenvalues even from 0.5 to 1 (so L = 1)."""
    n = int(np.prod(SHAPE))
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    curvature = basis @ np.diag(np.linspace(0.5, 1, n)) @ basis.T
    return Problem(
        jnp.asarray(curvature, jnp.float32), jnp.asarray(rng.normal(size=n), jnp.float32)
    )


@functools.partial(jax.jit, static_argnames="rounds")
def trace(problem: Problem, key: jax.Array, rate: jax.Array, rounds: int) -> Trace:
    """Train for `rounds` rounds: a mask update, then dT - 1 SGD steps.

    W[q] are the weights before the q-th mask update and M[q] its mask, so that W * M - W are
    the weights that it drops.
    """
    tx = dstee.methods.dst_ee(
        optax.sgd(rate),
        c=C,
        sparsity=SPARSITY,
        total_steps=(rounds + 1) * DELTA_T,
        key=jax.random.fold_in(key, 0),
        every=DELTA_T,
        stop=1.0,
        drop_fraction=optax.constant_schedule(DROP_FRACTION),
    )
    params = {"kernel": jax.random.normal(jax.random.fold_in(key, 1), SHAPE)}
    state = tx.init(params)
    params = dstee.apply_masks(params, state)

    def step(carry, mask_step):
        params, state = carry
        noise = jax.random.normal(jax.random.fold_in(key, state.count + 2), SHAPE)
        noise = noise * SIGMA / np.sqrt(noise.size)
        grads = {"kernel": problem.gradient(params["kernel"]) + noise}
        return dstee.apply(tx, grads, state, params, mask_step=mask_step)

    def sgd_steps(carry):
        return jax.lax.fori_loop(0, DELTA_T - 1, lambda _, carry: step(carry, False), carry)

    def round_(carry, _):
        w = carry[0]["kernel"]
        carry = step(carry, True)
        masked = jnp.where(carry[1].masks["kernel"], w, 0)
        row = Trace(
            problem.loss(w),
            jnp.sum(problem.gradient(w) ** 2),
            jnp.sum(problem.gradient(masked) ** 2),
            jnp.sum(w**2),
            jnp.sum((masked - w) ** 2),
        )
        return sgd_steps(carry), row

    return jax.lax.scan(round_, sgd_steps((params, state)), None, length=rounds)[1]


def rate_of(rounds: int) -> float:
    """Proposition 2's learning rate, with L = 1."""
    return 1 / (16 * DELTA_T * np.sqrt(rounds))


def traces(problem: Problem, rounds: int, rate: float, seeds: int) -> Trace:
    """Traces of all seeds, (seeds, rounds); one after the other, so that steps stay cheap."""
    rows = [trace(problem, jax.random.key(s), rate, rounds) for s in range(seeds)]
    return Trace(*(np.stack(column) for column in zip(*rows, strict=True)))


def convergence(problem: Problem, seeds: int = SEEDS, all_rounds=ROUNDS) -> dict[str, Any]:
    """Proposition 2: the mean squared gradient norm against Q, above the floor of the masks."""
    by_rounds = [traces(problem, q, rate_of(q), seeds) for q in over(all_rounds, "lengths")]
    # The longest run has come to a standstill: what its last quarter leaves does not get smaller.
    floor = by_rounds[-1].masked_gradient[:, -all_rounds[-1] // 4 :].mean(1)
    means = np.stack([t.masked_gradient.mean(1) for t in by_rounds], 1)  # (seeds, Q)
    above = means - floor[:, None]
    logs = np.log(all_rounds)
    slopes = [np.polyfit(logs, np.log(row), 1)[0] for row in above]
    return {
        "rounds": list(all_rounds),
        "mean_gradient": means.mean(0).tolist(),
        "floor": float(floor.mean()),
        "above_floor": above.mean(0).tolist(),
        "slopes": (np.diff(np.log(above.mean(0))) / np.diff(logs)).tolist(),  # from Q to Q
        "slope": float(np.mean(slopes)),
        "slope_sd": float(np.std(slopes, ddof=1)),
    }


def decrease(problem: Problem, rounds: int, seeds: int = SEEDS) -> dict[str, Any]:
    """Proposition 1: each round's change of F, the mean over seeds, beside the bound on it."""
    rate = rate_of(rounds)
    t = traces(problem, rounds, rate, seeds)
    tau2 = float((t.error / t.size).max())
    change = np.diff(t.loss, axis=1).mean(0)
    bound = (
        -rate * DELTA_T / 12 * t.gradient[:, :-1].mean(0)
        + rate**2 * SIGMA**2 * DELTA_T**2 / 2
        + 2 * rate * tau2 * DELTA_T**2 / 3 * t.size[:, :-1].mean(0)
    )
    return {
        "rounds": rounds,
        "tau2": tau2,
        "change": change.tolist(),
        "bound": bound.tolist(),
        "holds": float((change <= bound).mean()),
        # Without the mask term, which is the largest: how much of the bound it makes.
        "holds_without_mask_term": float(
            (change <= bound - 2 * rate * tau2 * DELTA_T**2 / 3 * t.size[:, :-1].mean(0)).mean()
        ),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=SEEDS)
    parser.add_argument("--results", type=Path, default=records.RESULTS / "theory.jsonl")
    args = parser.parse_args(argv)
    problem = make_problem()
    second = convergence(problem, args.seeds)
    print("Proposition 2: mean of |grad F(W * M)|^2 over rounds, and what is above the floor")
    for row in zip(second["rounds"], second["mean_gradient"], second["above_floor"], strict=True):
        scaled = row[2] * np.sqrt(row[0])
        print("  Q = {:>6}: {:8.3f}  {:8.3f}".format(*row), f"  times sqrt(Q): {scaled:.0f}")
    print(f"  floor {second['floor']:.4f}")
    print(f"  slope {second['slope']:.3f} ± {second['slope_sd']:.3f} over all Q (the bound: -0.5)")
    print("  from one Q to the next: " + ", ".join(f"{s:.3f}" for s in second["slopes"]))
    first = decrease(problem, 256, args.seeds)
    print(
        f"Proposition 1: holds in {first['holds']:.1%} of {len(first['change'])} rounds "
        f"(tau^2 = {first['tau2']:.4f}); without its mask term in "
        f"{first['holds_without_mask_term']:.1%}"
    )
    records.append(
        args.results, {"seeds": args.seeds, "proposition_1": first, "proposition_2": second}
    )
    conclude(Console(), f"both propositions, {args.seeds} seeds", record=args.results)


if __name__ == "__main__":
    main()
