"""Take the picture of a report that docs/verbs/report.md shows; needs Chromium.

python scripts/screenshot.py report.html docs/images/report.png [HEIGHT]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chromium import browser


def main(report: str, picture: str, height: str = "1180") -> None:
    """Open the report in a window of a laptop's width and save what is seen."""
    with browser() as page:
        size = {"width": 1280, "height": int(height), "deviceScaleFactor": 1, "mobile": False}
        page.send("Emulation.setDeviceMetricsOverride", **size)
        page.open(Path(report).resolve().as_uri())
        while not page.run("document.documentElement.dataset.views"):
            time.sleep(0.05)
        page.screenshot(Path(picture), whole=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
