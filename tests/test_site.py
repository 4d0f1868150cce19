"""The documentation site: every public name is on it, it builds strictly, and pages look right."""

import ast
import functools
import http.server
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dstee_jax as dstee
from tests.test_public_names import MODULES, OPTIONAL

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Of the modules' names, those that the engine takes from there and users have no use for.
INSIDE = {"memory.first_rule_state", "memory.recall", "memory.remember"}


def public(module):
    """The names that a public module has of its own, or hands on from where it is written."""
    found = importlib.import_module(f"dstee_jax.{module}")
    if hasattr(found, "__all__"):
        return set(found.__all__)
    parsed = ast.walk(ast.parse(Path(found.__file__).read_text()))
    froms = [node for node in parsed if isinstance(node, ast.ImportFrom)]
    homes = {node.module for node in froms if node.names[0].name == "*"} or {found.__name__}
    return {
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and getattr(value, "__module__", None) in homes
    }


def documented():
    """The names on the API's pages, with their modules."""
    names = []
    for page in (DOCS / "api").glob("*.md"):
        at = "dstee_jax"
        for line in page.read_text().splitlines():
            directive, _, value = line.removeprefix(".. ").partition(":: ")
            at = value if directive == "currentmodule" else at
            names += [f"{at}.{value}"] if directive.startswith("auto") and value else []
    return names


def test_every_public_name_is_documented_once():
    wanted = {f"dstee_jax.{name}" for name in set(dstee.__all__) - MODULES}
    for module in MODULES | OPTIONAL:
        assert public(module), module
        wanted |= {f"dstee_jax.{module}.{name}" for name in public(module)}
    wanted -= {f"dstee_jax.{name}" for name in INSIDE}
    assert {"dstee_jax.scores.magnitude", "dstee_jax.tiled_nnx.Linear"} <= wanted
    assert sorted(documented()) == sorted(wanted)


def test_every_module_is_named_on_the_first_page_of_the_api():
    assert set(re.findall(r"`(\w+)`", (DOCS / "api/index.md").read_text())) >= MODULES | OPTIONAL


# --- the site itself


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("sphinx", "sphinx_book_theme", "myst_nb"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "--keep-going"]
    run = subprocess.run([*command, DOCS, out / "html"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out / "html"


def test_builds_strictly(site):
    pages = {str(p.relative_to(site)) for p in site.rglob("*.html")}
    assert {"index.html", "tour.html", "recipes.html", "api/parts.html"} <= pages
    for page in pages:  # nothing is fetched from elsewhere
        text = (site / page).read_text()
        assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(?:https?:)?//', text), page


# Loads each page in a frame of each width; posts what is wider than it should be.
LOOK = """<!doctype html><link rel="icon" href="data:,"><script>
const found = [];
const frame = document.createElement("iframe");
async function look(page, width) {
  frame.style.width = width + "px";
  await new Promise(done => { frame.onload = done; frame.src = "/" + page; });
  const d = frame.contentDocument, body = d.querySelector("article.bd-article") || d.body;
  const right = body.getBoundingClientRect().right + 1;
  if (d.documentElement.scrollWidth > width + 1)
    found.push([page, width, "the page is " + d.documentElement.scrollWidth + " wide"]);
  for (const e of body.querySelectorAll("table, img, pre"))
    if (e.getBoundingClientRect().right > right && !e.closest(".cell_output, dt"))
      found.push([page, width, e.tagName + " " + e.textContent.trim().slice(0, 40)]);
}
onload = async () => {
  frame.style.height = "900px"; frame.style.border = "0";
  document.body.append(frame);
  for (const page of PAGES) for (const width of [1280, 390]) await look(page, width);
  await fetch("/", {method: "POST", body: JSON.stringify(found)});
};
</script><body></body>"""


class Server(http.server.ThreadingHTTPServer):
    """The site, with the page that looks at the others; what it has found, and what was missing."""

    def __init__(self, site, pages):
        self.look = LOOK.replace("PAGES", json.dumps(pages)).encode()
        self.missing, self.found, self.done = [], None, threading.Event()
        super().__init__(("localhost", 0), functools.partial(Handler, directory=str(site)))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Of one request."""

    def do_GET(self):
        if self.path != "/look":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.look)

    def do_POST(self):
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def send_error(self, code, *args, **options):
        self.server.missing.append((code, self.path))
        super().send_error(code, *args, **options)

    def log_message(self, *args):
        pass


def test_pages_in_a_browser(site, tmp_path):
    """No errors in the console, nothing missing, and nothing wider than the page."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    pages = sorted(str(p.relative_to(site)) for p in site.rglob("*.html"))
    pages = [page for page in pages if not page.startswith("_")]  # no sources, no templates
    with Server(site, pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1400,1000",
        ]
        command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
        log = tmp_path / "log"
        with log.open("w") as file:
            address = f"http://localhost:{server.server_port}/look"
            process = subprocess.Popen([*command, address], stderr=file, stdout=file)
            try:
                assert server.done.wait(60), log.read_text()
            finally:
                process.terminate()
                process.wait()
        server.shutdown()
    console = [line for line in log.read_text().splitlines() if "CONSOLE" in line]
    errors = [line for line in console if re.search("error|refused|failed", line, re.IGNORECASE)]
    assert (server.found, server.missing, errors) == ([], [], [])
