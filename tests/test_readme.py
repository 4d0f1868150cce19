"""The README's Python blocks run, in order, as a reader would run them."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "kernel" in printed
    assert "11,760" in printed  # 5% of 784 * 300
    updates, state = namespace["tx"].update(
        namespace["grads"], namespace["tx"].init(namespace["params"]), namespace["params"]
    )
    assert updates["kernel"].shape == (784, 300)
    assert int(state.count) == 1
