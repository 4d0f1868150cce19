"""Link prediction: edge lists with every kind of dirt, walks and splits by their definition."""

import gzip
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import linkpred
from experiments.data import graphs, walks
from experiments.training import records

RNG = np.random.default_rng(0)


def write(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def edges_of(graph):
    return list(zip(graph.src.tolist(), graph.dst.tolist(), graph.time.tolist(), strict=True))


DIRTY = """% a comment
# another
10 20 5
20 10 3
oops
10 20
10 20 5
-1 20 4
7 7 1
20 1.5 2
30 20 nan

10 30 4 9
20 30 3.5"""


@pytest.mark.parametrize("name", ["g.txt", "g.txt.gz"])
@pytest.mark.parametrize("separator", [" ", "\t", ",", "  "])
def test_dirt_is_left_out_and_said(tmp_path, name, separator):
    graph = graphs.read(write(tmp_path / name, DIRTY.replace(" ", separator)))
    # ids 10, 20, 30 become 0, 1, 2; by time
    assert edges_of(graph) == [(1, 0, 3.0), (1, 2, 3.5), (0, 1, 5.0)]
    assert graph.nodes == 3
    assert graph.dropped == {
        "malformed": 5 + (separator in "\t,") * 0,
        "negative ids": 1,
        "self-loops": 1,
        "duplicates": 1,
    }
    assert graphs.describe(graph) == (
        "3 nodes, 3 timed edges (left out: 5 malformed, 1 negative ids, 1 self-loops, 1 duplicates)"
    )


def test_four_columns_have_a_weight(tmp_path):
    graph = graphs.read(write(tmp_path / "g.edges", "1 2 9 100\n2 3 8 50\r\n"))
    assert edges_of(graph) == [(1, 2, 50.0), (0, 1, 100.0)]
    assert graphs.describe(graph) == "3 nodes, 2 timed edges (left out: nothing)"


def test_quick_and_slow_parsing_agree(tmp_path, monkeypatch):
    rows = RNG.integers(0, 50, (2000, 3))
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    clean = graphs.read(write(tmp_path / "clean", text))
    monkeypatch.setattr(graphs, "_CHUNK", 1000)  # many pieces, cut within lines
    assert edges_of(graphs.read(tmp_path / "clean")) == edges_of(clean)
    commented = graphs.read(write(tmp_path / "slow", "# c\n" + text.replace("\n", "\n# c\n")))
    assert edges_of(commented) == edges_of(clean)
    expected = sorted({(t, s, d) for s, d, t in rows.tolist() if s != d})
    names = {n: i for i, n in enumerate(sorted({n for _, s, d in expected for n in (s, d)}))}
    assert edges_of(clean) == [(names[s], names[d], t) for t, s, d in expected]


@pytest.mark.parametrize(
    ("text", "message"), [("", "has no line of 3"), ("a b c\n1 2\n", "has no line of 3 numbers")]
)
def test_files_without_edges(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        graphs.read(write(tmp_path / "g", text))
    with pytest.raises(FileNotFoundError, match="no edge list"):
        graphs.read(tmp_path / "nowhere")


def random_graph(nodes=30, edges=300, moments=40):
    ends = RNG.integers(0, nodes, (edges, 2))
    ends = ends[ends[:, 0] != ends[:, 1]]
    time = np.sort(RNG.integers(0, moments, len(ends))).astype(float)
    src, dst = ends.T.astype(np.int32)
    return graphs.Graph(src, dst, time, nodes, {})


def test_split():
    graph = random_graph()
    split = graphs.split(graph, 0)
    n, present = len(graph.src), set(zip(graph.src.tolist(), graph.dst.tolist(), strict=True))
    sizes = [len(part) for part in split[:3]]
    assert sizes == [2 * (n - 2 * round(0.2 * n)), 2 * round(0.2 * n), 2 * round(0.2 * n)]
    for part in split[:3]:
        edges, others = np.split(part, 2)
        assert {tuple(e) for e in edges.tolist()} <= present
        assert not {tuple(e) for e in others.tolist()} & present
        assert (others[:, 0] != others[:, 1]).all()
        half = len(edges) // 2
        np.testing.assert_array_equal(others[:half, 0], edges[:half, 0])  # a new tail only
        assert (others[half:, 0] != edges[half:, 0]).mean() > 0.8  # both ends new
    everything = np.concatenate([p[: len(p) // 2] for p in split[:3]])
    own = np.stack([graph.src, graph.dst], 1)
    assert sorted(everything.tolist()) == sorted(own.tolist())  # each edge in one part
    test_edges = split.test[: len(split.test) // 2]
    latest = graph.time[n - len(test_edges) :].min()
    times = {}
    for s, d, t in edges_of(graph):
        times.setdefault((s, d), []).append(t)
    assert all(max(times[tuple(e)]) >= latest for e in test_edges.tolist())
    assert graph.time[split.walked].max() <= latest
    again = graphs.split(graph, 0)
    np.testing.assert_array_equal(split.train, again.train)


def test_complete_graphs_have_no_non_edges():
    src, dst = (x.ravel().astype(np.int32) for x in np.mgrid[:5, :5])
    off = src != dst
    graph = graphs.Graph(src[off], dst[off], np.arange(20.0), 5, {})
    with pytest.raises(ValueError, match="20 of 20 possible edges are in the graph"):
        graphs.split(graph, 0)
    with pytest.raises(ValueError, match="has 2 edges: 10 are needed"):
        graphs.split(graph._replace(src=src[:2], dst=dst[:2], time=np.arange(2.0)), 0)


def test_walks_follow_edges_and_never_go_back_in_time():
    graph = random_graph()
    found = walks.temporal_walks(*graph[:4], per_node=20, steps=4, seed=1)
    by_pair = {}
    for s, d, t in edges_of(graph):
        by_pair.setdefault((s, d), []).append(t)
    lengths = set()
    for walk in found.tolist():
        nodes = walk[: walk.index(-1)] if -1 in walk else walk
        assert set(walk[len(nodes) :]) <= {-1}
        lengths.add(len(nodes))
        # The earliest time at which the walk can be at each node, by any choice of edges.
        now = -np.inf
        for s, d in itertools.pairwise(nodes):
            now = min(t for t in by_pair[s, d] if t >= now)
    assert max(lengths) == 5
    assert min(lengths) >= 2
    has_edge = np.unique(graph.src)
    np.testing.assert_array_equal(found[:, 0], np.repeat(has_edge, 20))


def test_steps_are_uniform_over_the_edges_that_are_left():
    # 0 -> 1 at 5, then from 1: to 2 at 4 (too early), to 3 at 5, to 3 at 7, to 4 at 6.
    src, dst, time = np.array([[0, 1, 5], [1, 2, 4], [1, 3, 5], [1, 3, 7], [1, 4, 6]]).T
    found = walks.temporal_walks(src, dst, time, 5, per_node=3000, steps=2, seed=0)
    from_0 = found[found[:, 0] == 0]
    share = np.bincount(from_0[:, 2], minlength=5) / len(from_0)
    np.testing.assert_allclose(share, [0, 0, 0, 2 / 3, 1 / 3], atol=0.03)
    from_1 = found[found[:, 0] == 1]
    assert set(np.unique(from_1[:, 1])) == {2, 3, 4}


def test_skip_gram_step_is_the_gradient_of_its_loss():
    """One batch against a double loop over pairs, in float64."""
    batch = np.array([[0, 1, 2, -1], [3, 3, 1, 0]], np.int32)
    inputs, outputs = RNG.normal(size=(2, 5, 3)) / 2
    key, table = jax.random.key(0), jnp.cumsum(jnp.full(5, 0.2))
    tx = optax.sgd(1.0)
    tables = tuple(jnp.asarray(t, jnp.float32) for t in (inputs, outputs))
    (new_in, new_out), _ = walks._step(tx, 2, 4, tables, tx.init(tables), batch, key, table)
    draws = np.searchsorted(np.asarray(table), np.asarray(jax.random.uniform(key, (2, 4, 4))))
    grads = [np.zeros_like(inputs), np.zeros_like(outputs)]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

    def pair(centre, other, label):
        error = sigmoid(inputs[centre] @ outputs[other]) - label
        grads[0][centre] += error * outputs[other]
        grads[1][other] += error * inputs[centre]

    for w, walk in enumerate(batch):
        for i, centre in enumerate(walk):
            for j, context in enumerate(walk):
                if i != j and abs(i - j) <= 2 and centre >= 0 and context >= 0:
                    pair(centre, context, 1)
                    for wrong in draws[w, i]:
                        pair(centre, wrong, 0)
    np.testing.assert_allclose(new_in, inputs - grads[0], atol=1e-5)
    np.testing.assert_allclose(new_out, outputs - grads[1], atol=1e-5)


def test_neighbours_are_near():
    """Two cliques: nodes of one are nearer to each other than to those of the other."""
    src, dst = (x.ravel() for x in np.mgrid[:20, :20])
    inside = (src // 10 == dst // 10) & (src != dst)
    src, dst = src[inside], dst[inside]
    found = walks.temporal_walks(src, dst, RNG.permutation(len(src)), 20, per_node=200)
    table = walks.skip_gram(found, 20, seed=0)
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    alike = table @ table.T
    same = np.arange(20)[:, None] // 10 == np.arange(20) // 10
    assert alike[same].mean() > alike[~same].mean() + 0.5


def test_command(tmp_path, capsys):
    # Four groups with edges inside, non-edges mostly between them: there is something to learn.
    ends = RNG.integers(0, 30, (4000, 2)) + 30 * RNG.integers(0, 4, (4000, 1))
    rows = np.concatenate([ends, RNG.integers(0, 100, (4000, 1))], 1)
    path = write(tmp_path / "ia-enron-email-x.txt", "\n".join(" ".join(map(str, r)) for r in rows))
    results = tmp_path / "r.jsonl"
    command = [f"--graph={path}", f"--results={results}", "--epochs=150", "--seed", "0", "1"]
    methods = ["--method", "dense", "dst_ee", "admm"]
    linkpred.main([*command, "--sparsity", "0.8", "--every=20", *methods])
    assert "120 nodes, 3,8" in capsys.readouterr().out
    runs = records.read(results)
    assert [r["method"] for r in runs] == ["dense", "dst_ee", "admm"] * 2
    assert all(abs(r["density"] - 0.2) < 0.01 for r in runs if r["method"] != "dense")
    assert np.mean([r["accuracy"] for r in runs if r["method"] == "dense"]) > 60
    linkpred.main(["--table", str(results)])
    printed = capsys.readouterr().out
    assert "| Prune-from-dense | 150 |" in printed
    assert "83.47" in printed
    assert printed.count("**") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass --graph FILE"),
        (["--graph=x", "--sparsity", "1.5"], "--sparsity 1.5 must be in"),
        (["--graph=x", "--method", "snipp"], "'snipp' is unknown; nearest:"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        linkpred.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_graph():
    with pytest.raises(SystemExit, match="error: no edge list"):
        linkpred.main(["--graph=nowhere.txt"])
