"""The paper's figures, drawn from records or a checkpoint, as PNG and SVG.

    python -m experiments.report.figures figure1       # from results/figure1.jsonl
    python -m experiments.report.figures figure2       # one mask update, computed and drawn
    python -m experiments.report.figures figure3       # from results/figure3.jsonl, made by runs of
        # experiments.cifar --method dst_ee --c C --results results/figure3.jsonl
    python -m experiments.report.figures exploitation  # from results/exploitation.jsonl
    python -m experiments.report.figures theory        # from results/theory.jsonl
    python -m experiments.report.figures length        # from results/length.jsonl
    python -m experiments.report.figures tiles         # from results/tiles.jsonl
    python -m experiments.report.figures tiles_lm      # from results/tiles_lm.jsonl
    python -m experiments.report.figures linkpred      # from results/linkpred.jsonl
    python -m experiments.report.figures lm            # from results/lm.jsonl
    python -m experiments.report.figures masks --work_dir DIR   # from a run's last checkpoint
    python -m experiments.report.figures animation     # the masks of a training, as a GIF

`--records FILE` draws other records, `--out DIR` writes elsewhere than docs/figures.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich.console import Console

import dstee_jax as dstee
from experiments.report import animation
from experiments.studies import length as study
from experiments.studies import tiles as tile_study
from experiments.studies import tiles_lm as tiles_lm_study
from experiments.training import records
from experiments.training.arguments import Parser
from experiments.training.checkpoints import Checkpoints, by_name
from experiments.training.progress import conclude

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart; markers differ too, for print.
COLORS = {"rigl": "#0072B2", "dst_ee": "#D55E00", "set": "#E69F00", "static": "#999999"}
COLORS |= {"dense": "#000000", "admm": "#009E73"}
SEQUENCE = ["#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000"]
MARKERS = "os^Dvx"
LABELS = {"rigl": "RigL: gradient", "dst_ee": "DST-EE: acquisition", "set": "SET: random"}
plt.rcParams.update({"svg.hashsalt": "dstee", "axes.spines.top": False, "axes.spines.right": False})


def figure1(runs: list[dict]) -> Figure:
    """Share of important inactive weights that each rule ignores, layer by layer."""
    run = runs[-1]
    layers = list(dict.fromkeys(row["layer"] for row in run["rows"]))
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    place = np.arange(len(layers))
    for i, method in enumerate(("rigl", "dst_ee")):
        rows = {row["layer"]: row for row in run["rows"] if row["method"] == method}
        height = [100 * rows[name]["ignored"] if name in rows else 0 for name in layers]
        axis.bar(
            *(place + 0.36 * (i - 0.5), height, 0.34),
            color=COLORS[method],
            label=LABELS[method],
            hatch="//" if i else None,
            edgecolor="white",
        )
    rows = {row["layer"]: row for row in run["rows"]}
    chance = [100 * rows[name]["chance"] for name in layers]
    axis.scatter(
        place, chance, marker="_", s=900, color="black", label="growth at random", zorder=3
    )
    axis.set_xticks(
        place, [name.removesuffix("/kernel") for name in layers], rotation=30, ha="right"
    )
    axis.set(ylabel="important weights ignored (%)", ylim=(0, 122))
    axis.set_title(f"{run['model']}, {run['data']}, {run['sparsity']:.0%} sparse, step 1000")
    axis.legend(loc="upper center", ncols=3, frameon=False)
    return figure


def figure2(_: list[dict]) -> Figure:
    """One mask update of a small layer: what is dropped, the score, what is grown."""
    shape, every = (6, 8), 5
    key = jax.random.key(3)
    tx = dstee.methods.dst_ee(
        optax.sgd(0.1), c=0.02, sparsity=0.7, total_steps=100, key=key, every=every
    )
    target, params = jax.random.normal(key, shape), {"kernel": jnp.zeros(shape)}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, 4 * every + 1):
        noise = 0.3 * jax.random.normal(jax.random.fold_in(key, step), shape)
        before, params_before = state, params
        grads = {"kernel": params["kernel"] - target + noise}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    w, g = (np.asarray(tree["kernel"]) for tree in (params_before, grads))
    old, new = (np.asarray(s.masks["kernel"]) for s in (before, state))
    counter = np.asarray(before.counters["kernel"])
    leaf = dstee.Leaf(w, g, old, counter, key, state.count)
    score = np.asarray(dstee.scores.acquisition(c=0.02)(leaf))
    dropped, grown = old & ~new, new & ~old
    panels = [
        ("weights $W^t$, mask $M$", np.where(old, w, np.nan), "RdBu", "{:.1f}"),
        ("drop: $k$ smallest $|W^t|$", np.where(old, abs(w), np.nan), "Greys", "{:.1f}"),
        ("gradient $|G^t|$", abs(g), "Blues", "{:.1f}"),
        ("rounds active $N^t$", counter.astype(float), "Oranges", "{:.0f}"),
        (
            r"score $|G^t| + c\,\ln t\,/\,(N^t+\epsilon)$",
            np.where(old, np.nan, score),
            "Purples",
            "{:.1f}",
        ),
        ("new mask $M$, counters $N^t + M$", np.where(new, 1.0, np.nan), "Greens", ""),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.2), layout="constrained")
    for i, (axis, (title, values, cmap, text)) in enumerate(zip(axes.flat, panels, strict=True)):
        top = np.nanmax(abs(values))
        axis.imshow(values, cmap=cmap, vmin=-1.6 * top if cmap == "RdBu" else 0, vmax=1.6 * top)
        axis.set_title(f"{i + 1}. {title}", fontsize=11)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        for (r, c), value in np.ndenumerate(values):
            if not np.isnan(value) and text:
                axis.text(c, r, text.format(value), ha="center", va="center", fontsize=7)
        for mask, color, style, shown in [
            (dropped, "#D55E00", "--", i in (0, 1, 5)),
            (grown, "#000000", "-", i in (4, 5)),
        ]:
            for r, c in np.argwhere(mask) if shown else ():
                box = plt.Rectangle((c - 0.45, r - 0.45), 0.9, 0.9, fill=False)
                box.set(edgecolor=color, linestyle=style, linewidth=2)
                axis.add_patch(box)
    figure.suptitle(
        f"One mask update at step t = {int(state.count)}: k = {dropped.sum()} weights dropped "
        f"(dashed), {grown.sum()} grown at zero (solid)"
    )
    return figure


def figure3(runs: list[dict]) -> Figure:
    """Exploration degree by round and accuracy by epoch, for several c; a row for each sparsity."""
    groups = records.group(runs, "data", "model", "sparsity")
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(9, 3.2 * len(groups)), layout="constrained", squeeze=False
    )
    for row, ((data, model, sparsity), cell) in zip(axes, sorted(groups.items()), strict=True):
        by_c = {}
        for run in cell:
            by_c.setdefault(run["options"].get("c", 1e-3), []).append(np.array(run["history"]))
        for i, (c, histories) in enumerate(sorted(by_c.items())):
            accuracy, explored = np.mean(histories, 0).T
            style = {"color": SEQUENCE[i], "marker": MARKERS[i], "ms": 4, "label": f"c = {c:g}"}
            epoch = 1 + np.arange(len(accuracy))
            row[0].plot(_rounds(cell[0], epoch), explored, **style)
            row[1].plot(epoch, accuracy, **style)
        seeds = len(next(iter(by_c.values())))
        row[0].set(xlabel="mask update round", ylabel="exploration degree R")
        row[0].set_title(f"{data}, {model}, {sparsity:.0%}, {seeds} seed{'s' * (seeds > 1)}")
        row[1].set(xlabel="epoch", ylabel="test accuracy (%)")
        row[0].legend(frameon=False, fontsize="small")
    return figure


def _rounds(run: dict, epoch: np.ndarray) -> np.ndarray:
    """How many mask updates a run had seen after each epoch; its options or the defaults."""
    every, stop = run["options"].get("every", 100), run["options"].get("stop", 0.75)
    steps = np.minimum(epoch * run["steps"] / run["epochs"], stop * run["steps"])
    return steps // every


def exploitation(runs: list[dict]) -> Figure:
    """Exploitation and exploration degree by round, mean and standard deviation over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, ((method,), cell) in enumerate(records.group(runs, "method").items()):
        for axis, name in zip(axes, ("exploitation", "R"), strict=True):
            values = np.array([run[name] for run in cell])
            mean, sd = values.mean(0), values.std(0)
            rounds = 1 + np.arange(len(mean))
            style = {"color": COLORS[method], "marker": MARKERS[i], "markevery": 3, "ms": 5}
            axis.plot(rounds, mean, label=LABELS[method], **style)
            axis.fill_between(rounds, mean - sd, mean + sd, color=COLORS[method], alpha=0.2, lw=0)
    axes[0].axhline(0, color="black", lw=0.6)
    axes[0].set(xlabel="mask update round", ylabel=r"exploitation degree $\Delta L_g$ (Eq. 3)")
    axes[1].set(xlabel="mask update round", ylabel="exploration degree R", ylim=(0, None))
    axes[0].legend(frameon=False)
    first = runs[0]
    figure.suptitle(f"{first['data']}, {first['sparsity']:.0%} sparse; band: 1 sd over seeds")
    return figure


def theory(runs: list[dict]) -> Figure:
    """Proposition 2's rate, and Proposition 1's bound beside the measured decrease."""
    first, second = runs[-1]["proposition_1"], runs[-1]["proposition_2"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    rounds, above = (np.array(second[name]) for name in ("rounds", "above_floor"))
    axes[0].loglog(rounds, second["mean_gradient"], "s-", color="#999999", label="measured")
    axes[0].loglog(rounds, above, "o-", color="#D55E00", label="above the masks' floor")
    bound = above[-1] * np.sqrt(rounds[-1] / rounds)
    axes[0].loglog(rounds, bound, "k--", label=r"$\propto 1/\sqrt{Q}$")
    axes[0].set(xlabel="rounds Q", ylabel=r"mean of $|\nabla F(W \odot M)|^2$")
    axes[0].set_title(f"Proposition 2: slope {second['slope']:.2f} ± {second['slope_sd']:.2f}")
    axes[0].legend(frameon=False)
    q = 1 + np.arange(len(first["change"]))
    axes[1].plot(q, first["change"], color="#0072B2", label="measured change of F")
    axes[1].plot(q, first["bound"], color="#D55E00", ls="--", label="right-hand side of Eq. 4")
    axes[1].axhline(0, color="black", lw=0.6)
    axes[1].set(xlabel="round q", ylabel="change of F in a round")
    axes[1].set_title(f"Proposition 1: holds in {first['holds']:.0%} of the rounds")
    axes[1].legend(frameon=False)
    return figure


def length(runs: list[dict]) -> Figure:
    """What DST-EE gains over RigL, by the length of training; a line for each sparsity."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    tested = [run for run in runs if run["split"] == "test"]
    for (data, model, _, sparsity), some in study.settings_of(tested).items():
        by_length = {epochs: study.by_row(group) for epochs, group in study.lengths(some).items()}
        gains = {
            epochs: study.gain(rows[study.DST_EE], rows[study.RIGL])
            for epochs, rows in by_length.items()
            if {study.DST_EE, study.RIGL} <= set(rows)
        }
        if not gains:
            continue
        i = len(axis.containers)
        mean, error, seeds = np.array(list(gains.values())).T
        name = f"{data}, {model}, {sparsity:.0%} ({seeds.min():.0f} seeds)"
        style = {"color": SEQUENCE[i], "marker": MARKERS[i], "capsize": 3, "label": name}
        axis.errorbar(list(gains), mean, error, **style)
    axis.axhline(0, color="black", lw=0.6)
    axis.set(xlabel="epochs", ylabel="test accuracy, points over RigL", xscale="log")
    ticks = sorted({run["epochs"] for run in tested})
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set_title("DST-EE's gain by the length of training, ± its standard error")
    axis.legend(frameon=False, fontsize="small")
    return figure


def tiles(runs: list[dict]) -> Figure:
    """Accuracy against the time of a step, by tile and method; a panel for each sparsity."""
    panels = {}
    for (sparsity, epochs), some in records.group(runs, "sparsity", "epochs").items():
        seeds = len(some[0]["seeds"])
        cells = {}
        for size in tile_study.TILES:
            mine = tile_study.having(some, size)
            for run in mine:
                cells[size, run["method"]] = tile_study.step_ms(mine), run["accuracy"]
        panels[f"{sparsity:.0%} sparse, {epochs} epochs, {seeds} seeds"] = cells
    return _by_step_time(panels, "ms a step, all seeds", "test accuracy (%)")


def tiles_lm(runs: list[dict]) -> Figure:
    """Perplexity against the time of a step, by tile and method; a panel for each setting."""
    panels = {}
    for setting, some in tiles_lm_study.groups(runs).items():
        cells = {
            (size, method): (ms, [run["perplexity"] for run in mine])
            for (size, method), mine in tiles_lm_study.cells(some).items()
            if (ms := tiles_lm_study.step_ms(some, size)) is not None
        }
        if cells:
            panels[f"{setting}, {tiles_lm_study.seeds_of(some)} seeds"] = cells
    return _by_step_time(panels, "ms an ordinary step", "test perplexity of a byte")


def _by_step_time(panels: dict[str, dict], time: str, measure: str) -> Figure:
    """A panel for each title: {(tile, method): (ms, values of the seeds)}, mean and deviation."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained", squeeze=False
    )
    sizes = dict.fromkeys(size for cells in panels.values() for size, _ in cells)
    colors = dict(zip(sizes, SEQUENCE, strict=False))
    markers = dict(zip(tile_study.METHODS, MARKERS, strict=False))
    for axis, (title, cells) in zip(axes[0], panels.items(), strict=True):
        for (size, method), (ms, found) in cells.items():
            mean, sd = np.mean(found), np.std(found, ddof=1) if len(found) > 1 else 0.0
            style = {"color": colors[size], "marker": markers[method], "capsize": 2}
            beside = 1 + 0.02 * (tile_study.METHODS.index(method) - 1)
            axis.errorbar(ms * beside, mean, sd, ls="", **style)
        axis.set_title(textwrap.fill(title, 54), fontsize="medium")
        axis.set(xlabel=time, ylabel=measure, xscale="log")
        axis.margins(0.12, 0.12)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
    names = {"dst_ee": "DST-EE", "rigl": "RigL", "static": "static"}
    for method, marker in markers.items():
        axes[0, 0].plot([], [], color="#999999", marker=marker, ls="", label=names[method])
    for size, color in colors.items():
        axes[0, 0].plot([], [], color=color, lw=6, label=tile_study.name_of(size))
    figure.legend(frameon=False, loc="outside lower center", ncols=len(markers) + len(colors))
    return figure


def linkpred(runs: list[dict]) -> Figure:
    """Accuracy of link prediction by sparsity; a panel for each graph."""
    fair = [run for run in runs if run["walks"] == "training edges"]
    groups = records.group(fair, "graph")
    figure, axes = plt.subplots(
        1, len(groups), figsize=(3.6 * len(groups), 3.2), layout="constrained", squeeze=False
    )
    names = {"admm": "prune-from-dense", "dst_ee": "DST-EE"}
    for axis, ((graph,), some) in zip(axes[0], groups.items(), strict=True):
        for i, ((method,), mine) in enumerate(records.group(some, "method").items()):
            cells = sorted(records.group(mine, "sparsity").items())
            found = [[run["accuracy"] for run in cell] for _, cell in cells]
            place = 100 * np.array([sparsity for (sparsity,), _ in cells])
            mean, sd = (np.array([f(x) for x in found]) for f in (np.mean, np.std))
            style = {"color": COLORS[method], "label": names.get(method, method)}
            if method == "dense":
                axis.axhline(mean[0], ls="--", **style)
            else:
                axis.errorbar(place, mean, sd, marker=MARKERS[i], capsize=3, **style)
        axis.set(xlabel="sparsity (%)", title=graph)
        axis.title.set_fontsize("medium")
    axes[0, 0].set_ylabel("test accuracy (%)")
    seeds = len(found[0])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    where = {"loc": "outside lower center", "ncols": 4, "frameon": False}
    figure.legend(handles, labels, title=f"{seeds} seeds, ± their standard deviation", **where)
    return figure


def lm(runs: list[dict]) -> Figure:
    """Validation perplexity of the language model over training, a line for each method."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    groups = records.group(runs, "method")
    for i, ((method,), some) in enumerate(groups.items()):
        step = np.array(some[0]["history"])[:, 0]
        mean = np.mean([np.array(run["history"])[:, 1] for run in some], axis=0)
        style = {"color": COLORS[method], "marker": MARKERS[i], "ms": 5}
        axis.plot(step, mean, label=LABELS.get(method, method), **style)
    first, seeds = runs[-1], max(map(len, groups.values()))
    axis.set(xlabel="step", ylabel="validation perplexity of a byte", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    what = f"{first['data']}, {first['sparsity']:.0%} sparse"
    axis.set_title(f"{what}, {seeds} seed{'s' * (seeds > 1)}")
    axis.legend(frameon=False, fontsize="small")
    return figure


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """For sorting layers: block 2 comes before block 10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split("/")]


def masks(work_dir: Path) -> Figure:
    """Densities of the layers, and how many inputs each output unit of the largest ones reads."""
    state = Checkpoints(work_dir, keep=True).restore_plain()["opt_state"]
    if "masks" not in state:
        raise FileNotFoundError(
            f"the run in {work_dir} keeps no masks: it is dense, or trains dense weights."
        )
    saved = by_name(state["masks"]).items()
    found = {name.removesuffix("/kernel"): mask for name, mask in saved}
    counters = by_name(state["counters"]).values()
    explored = {name: (counter > 0).mean() for name, counter in zip(found, counters, strict=True)}
    found = dict(sorted(found.items(), key=lambda item: _in_order(item[0])))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    place = np.arange(len(found))
    density = [100 * m.mean() for m in found.values()]
    axes[0].bar(
        place, [100 * explored[name] for name in found], color="#BBBBBB", label="ever active"
    )
    axes[0].bar(place, density, 0.5, color="#0072B2", label="active", hatch="//", edgecolor="w")
    step = max(len(found) // 20, 1)
    axes[0].set_xticks(place[::step], list(found)[::step], rotation=60, ha="right", fontsize=7)
    axes[0].set(ylabel="weights (%)", title="layers")
    axes[0].legend(frameon=False)
    for i, (name, mask) in enumerate(sorted(found.items(), key=lambda p: -p[1].size)[:3]):
        fan_in = np.sort(mask.reshape(-1, mask.shape[-1]).sum(0))[::-1]
        share = np.linspace(0, 1, len(fan_in))
        axes[1].plot(share, fan_in, color=SEQUENCE[i], marker=MARKERS[i], markevery=0.1, label=name)
    axes[1].set(xlabel="share of output units, most inputs first", ylabel="active inputs")
    axes[1].set_title("the largest layers: active inputs of a unit")
    axes[1].legend(frameon=False, fontsize="small")
    return figure


DRAWN: dict[str, Callable[[list[dict]], Figure]] = {
    "figure1": figure1,
    "figure2": figure2,
    "figure3": figure3,
    "exploitation": exploitation,
    "theory": theory,
    "length": length,
    "tiles": tiles,
    "tiles_lm": tiles_lm,
    "linkpred": linkpred,
    "lm": lm,
}


def save(figure: Figure, path: Path) -> list[Path]:
    """As PNG and SVG; the same records give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for one, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        figure.savefig(one, dpi=130, metadata=metadata)
    plt.close(figure)
    return paths


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("name", choices=[*DRAWN, "masks", "animation"])
    parser.add_argument("--records", type=Path, help="default results/NAME.jsonl")
    parser.add_argument("--work_dir", type=Path, help="of the run, for masks")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args(argv)
    if args.name == "animation":
        gif = animation.draw(args.out / args.name)
        conclude(Console(), "animation drawn", picture=gif)
        return
    try:
        if args.name == "masks":
            if args.work_dir is None:
                parser.error("masks needs --work_dir, the directory of a run.")
            figure = masks(args.work_dir)
        elif args.name == "figure2":
            figure = figure2([])
        else:
            path = args.records or records.RESULTS / f"{args.name}.jsonl"
            figure = DRAWN[args.name](records.read(path))
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    png, svg = save(figure, args.out / args.name)
    conclude(Console(), f"{args.name} drawn", picture=png, vectors=svg)


if __name__ == "__main__":
    main()
