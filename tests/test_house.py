"""The house rules, held by reading the source: which room may import which, and what a file may contain.

The rules and their reasons stand in CONTRIBUTING.md. A failure names file, line and what to do.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import moekit

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "moekit"

# Rooms from the ground up. A file imports from lower floors and from its own room, nothing else.
FLOORS = {
    "errors": 1,
    "refmoe": 1,  # package data: the reference model and its texts
    "progress": 1,
    "tally": 1,
    "footprint": 1,  # of the process
    "markup": 1,  # tables for notebooks
    "arrays": 2,
    "layout": 2,
    "recipe": 2,
    "data": 2,
    "checkpoint": 3,
    "plans": 3,
    "stats": 3,
    "families": 4,
    "trace": 4,
    "methods": 4,
    "view": 5,
    "report": 5,
    "stream": 6,
    "apply": 6,
    "subsets": 6,  # what a layer loses with each set of experts
    "measurement": 7,
    "evaluation": 7,
    "serve": 7,
    "recording": 8,  # traces: measures as it writes
    "fitting": 8,  # passes over text that compute new weights
    "decoding": 8,  # texts written by several passes, or several models, together
    "planning": 9,  # what to do for a budget of bytes
    "steering": 9,  # find and test plans that steer
    "pipeline": 10,
    "__init__": 10,  # the Python face: may import anything itself, lazily; only the command line may import it
    "cli": 11,
    "__main__": 12,
}

# In methods/ a file imports none of its siblings but these (and files whose name starts with an underscore).
SHARED_METHOD_MODULES = {"common"}

# Rule 2, "nobody but families/ inspects configs or model classes", is held by refusing `x.config.y`, `hasattr` and
# `getattr` of a config elsewhere. An exception is a file, the expression as `ast.unparse` writes it, and the reason.
PROBES_ALLOWED: dict[tuple[str, str], str] = {}

MAX_LINES = 450


def modules(src: Path) -> dict[str, Path]:
    """Dotted name -> file of every module under `src`; a package is named by its folder."""
    found = {}
    for path in sorted(src.rglob("*.py")):
        parts = ("moekit", *path.relative_to(src).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The first name below `moekit`; `__init__` for the package itself."""
    return [*module.split("."), "__init__"][1]


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, dotted target) of every import of moekit in a file, wherever it stands; `__version__` is free to all."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names if alias.name != "__version__"]
            targets = [name if name in known else base for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            targets = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        for target in dict.fromkeys(targets):
            if target.split(".")[0] == "moekit":
                yield node.lineno, target


def may_see_methods(module: str) -> bool:
    """Packages and the registry gather methods; a method and what methods share do not."""
    return module.split(".")[-1] == "_registry" or module.count(".") < 3


def is_shared(module: str) -> bool:
    """Whether a method may import this module of methods/."""
    below = module.split(".")[2:]
    return not below or any(name in SHARED_METHOD_MODULES or name.startswith("_") for name in below)


def floor_offences(src: Path) -> list[str]:
    """Every import that runs upwards or sideways, as `file:line: what is wrong`."""
    known, offences = modules(src), []
    for module, path in known.items():
        here = room(module)
        for line, target in imports(module, path, known):
            there, where = room(target), f"{path.relative_to(src)}:{line}"
            if missing := {here, there} - FLOORS.keys():
                offences.append(f"{where}: no floor for {sorted(missing)}; add a row to FLOORS in tests/test_house.py")
            elif here == there == "methods":
                if not may_see_methods(module) and not is_shared(target):
                    offences.append(f"{where}: a method imports another, {target}; move what they share to common")
            elif here not in (there, "__init__") and FLOORS[there] >= FLOORS[here]:
                offences.append(f"{where}: {here} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})")
    return offences


def probe_offences(src: Path) -> list[tuple[str, str, int]]:
    """(file, expression, line) of each look into a config or a model class outside families/."""
    found = []
    for module, path in modules(src).items():
        if room(module) == "families":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            probe = False
            if isinstance(node, ast.Attribute):
                probe = isinstance(node.value, ast.Attribute) and node.value.attr == "config"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                of_config = bool(node.args) and ast.unparse(node.args[0]).split(".")[-1] == "config"
                probe = node.func.id == "hasattr" or (node.func.id == "getattr" and of_config)
            if probe:
                found.append((str(path.relative_to(src)), ast.unparse(node), node.lineno))
    return found


def tracked_files() -> list[Path]:
    """Every file that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the tracked files are unknown")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def lines_matching(paths: list[Path], pattern: str) -> list[str]:
    """`file:line: text` of every line of the text files among `paths` that holds `pattern`."""
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def report(offences: list[str]) -> str:
    return "\n" + "\n".join(offences)


def test_imports_run_one_way():
    offences = floor_offences(SRC)
    assert not offences, report(offences)


def test_every_room_has_a_floor():
    unknown = sorted({room(module) for module in modules(SRC)} - FLOORS.keys())
    assert not unknown, f"no floor for {unknown}: add a row to FLOORS in tests/test_house.py"


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("layout.py", "from moekit.plans import Plan", "layout (floor 2) imports moekit.plans (floor 3)"),
        ("layout.py", "from .plans import Plan", "layout (floor 2) imports moekit.plans (floor 3)"),
        ("layout.py", "from . import plans", "layout (floor 2) imports moekit.plans (floor 3)"),
        ("layout.py", "def f():\n    import moekit.cli", "layout (floor 2) imports moekit.cli (floor 11)"),
        ("layout.py", "from moekit import open", "layout (floor 2) imports moekit (floor 10)"),
        ("plans.py", "from moekit.stats import Stats", "plans (floor 3) imports moekit.stats (floor 3)"),
        ("apply/bake.py", "from ..pipeline import run", "apply (floor 6) imports moekit.pipeline (floor 10)"),
        ("stats.py", "import importlib\nimportlib.import_module('moekit.view')", "imports moekit.view (floor 5)"),
        ("methods/prune/reap.py", "from moekit.methods.prune.ean import EAN", "a method imports another"),
        ("methods/prune/reap.py", "from . import ean", "a method imports another"),
        ("methods/prune/reap.py", "from moekit.methods.merge import msmoe", "a method imports another"),
        ("attic.py", "from moekit import errors", "no floor for ['attic']"),
        ("errors.py", "from moekit import __version__", None),
        ("plans.py", "from moekit.layout import Layout\nimport torch", None),
        ("apply/bake.py", "from .live import live\nfrom moekit.checkpoint.reader import Checkpoint", None),
        ("cli/demo.py", "import moekit", None),
        ("__init__.py", "def open():\n    from moekit.cli import main", None),
        ("methods/prune/reap.py", "from moekit.methods.common import keep\nfrom .._registry import method", None),
        ("methods/prune/__init__.py", "from . import ean, reap", None),
        ("methods/_registry.py", "from moekit.methods.prune import reap", None),
    ],
)
def test_floors_are_told_apart(tmp_path, path, line, complaint):
    for name in ("plans.py", "errors.py", "methods/common.py", "methods/prune/ean.py", "methods/prune/reap.py", path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / path).write_text(line)
    offences = floor_offences(tmp_path)
    assert [complaint in offence for offence in offences] == ([True] if complaint else [])


@pytest.mark.parametrize("module", ["moekit", "moekit.errors", "moekit.layout"])
def test_the_ground_floor_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, f"import {module} imports torch"


def test_only_families_inspect_configs():
    found = probe_offences(SRC)
    offences = [f"{path}:{line}: {code}" for path, code, line in found if (path, code) not in PROBES_ALLOWED]
    assert not offences, report(offences)
    stale = PROBES_ALLOWED.keys() - {(path, code) for path, code, _ in found}
    assert not stale, f"no longer needed in PROBES_ALLOWED: {sorted(stale)}"


def test_probes_are_told_apart(tmp_path):
    code = "model.config.num_experts\nhasattr(a, 'b')\ngetattr(config, 'k', 1)\nself.config\ngetattr(np, 'sum')\n"
    (tmp_path / "view.py").write_text(code)
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "contract.py").write_text(code)
    assert sorted(line for _, _, line in probe_offences(tmp_path)) == [1, 2, 3]


def test_public_modules_have_docstrings():
    public = {name: path for name, path in modules(SRC).items() if not name.split(".")[-1].startswith("_")}
    bare = [name for name, path in public.items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert "moekit.layout" in public
    assert not bare, f"no docstring that says what the file is for: {bare}"


def test_files_are_short():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in modules(SRC).values()}
    long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MAX_LINES]
    assert not long, f"over {MAX_LINES} lines, give each job its own file:" + report(long)


def test_nothing_is_left_unfinished():
    offences = lines_matching(list(modules(SRC).values()), r"\b(TODO|FIXME|XXX|NotImplementedError)\b|pragma: no cover")
    assert not offences, report(offences)


def test_no_paths_of_one_machine():
    texts = [path for path in tracked_files() if SRC / "refmoe" not in path.parents]  # its corpora are others' words
    offences = lines_matching(texts, r"(?<![\w.~}$-])/(work|root|home|Users|tmp|opt)/\w|\.\./shared/")
    assert not offences, report(offences)


def test_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == moekit.__version__
    assert f"[{moekit.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
