"""Make src/moekit/report/assets/vendor.js, the parts of d3 that the report draws with, and their licences beside it.

Only for whoever changes the versions in vendor_js/package.json: needs node, npm and a package registry. moekit itself
and its tests use the result, which is committed.

    python scripts/vendor_js.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix("")
ASSETS = SOURCE.parents[1] / "src" / "moekit" / "report" / "assets"


def main() -> None:
    """Install what the lock file names into a temporary folder, bundle it, and write both files."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "vendor"
        shutil.copytree(SOURCE, work)
        subprocess.run(["npm", "ci"], cwd=work, check=True)
        options = "--bundle --minify --format=iife --global-name=d3 --target=es2020 --legal-comments=none"
        command = ["npx", "esbuild", "entry.js", *options.split(), "--outfile=out.js", "--metafile=meta.json"]
        subprocess.run(command, cwd=work, check=True)
        output = json.loads((work / "meta.json").read_text())["outputs"]["out.js"]["inputs"]
        used = {Path(name).parts[1] for name, x in output.items() if "node_modules" in name and x["bytesInOutput"]}
        notice = licences(work / "node_modules", sorted(used))
        (ASSETS / "VENDOR_LICENSES.txt").write_text(notice)
        (ASSETS / "vendor.js").write_text(f"/*\n{notice}*/\n{(work / 'out.js').read_text()}")


def licences(modules: Path, names: list[str]) -> str:
    """Each licence text once, below the packages that stand under it and their copyright lines."""
    groups: dict[str, list[str]] = {}
    for name in names:
        about = json.loads((modules / name / "package.json").read_text())
        copyright, _, text = (modules / name / "LICENSE").read_text().strip().partition("\n")
        groups.setdefault(text.strip(), []).append(f"{name} {about['version']} ({about['license']}). {copyright}")
    return "\n\n".join("\n".join([*heads, "", text]) for text, heads in groups.items()) + "\n"


if __name__ == "__main__":
    main()
