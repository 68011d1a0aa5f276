"""The report as ONE HTML file: markup, style, scripts and data inline, nothing fetched from anywhere.

The page's content security policy allows only its own script and style, by their hashes, so that nothing in a token, a
domain's name or a model's name can run or load anything. Text reaches the page inside the compressed data and is shown
as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from moekit import __version__
from moekit.report.pack import to_blob

SCRIPTS = (
    "core.js",
    "heat.js",
    "text.js",
    "views_usage.js",
    "views_structure.js",
    "views_experts.js",
    "views_steering.js",
    "main.js",
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="moekit {version}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#views">to the views</a>
<div class="frame">
<nav aria-label="views"><ol id="contents"></ol></nav>
<main>
<header>
<h1>{title}</h1>
<p>{summary}</p>
<dl>{facts}</dl>
<noscript><p class="notice">The views below are drawn by a script in this file, and scripts are switched off in this \
browser. Allow them for this page, or read the same numbers in the JSON file beside it.</p></noscript>
</header>
<div id="views"></div>
<footer>Made by moekit {version}. Everything on this page is in this file; every number is in the JSON file beside it.
</footer>
</main>
</div>
<script type="application/gzip" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def render(payload: Mapping[str, Any]) -> str:
    """The page.

    Args:
        payload: from `moekit.report.collect`; with "live", the page may ask the server that it came from.
    """
    style, script = assets()
    facts = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in payload["facts"])
    return _PAGE.format(
        policy=policy("live" in payload),
        version=_text(__version__),
        title=_text(payload["title"]),
        summary=_text(payload["summary"]),
        facts=facts,
        style=style,
        script=script,
        data=base64.b64encode(to_blob(payload)).decode(),
    )


@cache
def assets() -> tuple[str, str]:
    """The style and the script of the page."""
    folder = files(__package__) / "assets"
    own = "\n".join((folder / name).read_text("utf-8") for name in SCRIPTS)
    vendor = (folder / "vendor.js").read_text("utf-8")
    script = f'{vendor}\n(async () => {{\n"use strict";\n{own}\n}})();\n'
    return (folder / "style.css").read_text("utf-8"), script


def policy(live: bool = False) -> str:
    """The content security policy: nothing but the page's own style and script, which are named by their hashes."""
    style, script = (_hash(x) for x in assets())
    connect = " connect-src 'self';" if live else ""
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:;{connect} "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(value: Any) -> str:
    return html.escape(str(value))
