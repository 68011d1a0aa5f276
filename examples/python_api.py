"""The README's example as a file: half of refmoe's experts for Python code, written and compared. Half a minute.

python examples/python_api.py [FOLDER]     # a new folder; out-refmoe-python if left out
"""

import sys

import moekit
from moekit import refmoe


def main(folder: str = "out-refmoe-python") -> None:
    """Write the smaller model to `folder` and print how it compares."""
    m = moekit.open("refmoe")
    stats = moekit.measure(m, data={"python": refmoe.calibration()["python"]})
    plan = moekit.plan("easy-ep", stats, keep=0.5, domain="python")
    print("\n".join(plan.notes))
    out = moekit.bake(m, plan, folder)
    print(moekit.evaluate(out, against=m, data={"python": refmoe.texts()["python"], "kjv": refmoe.texts()["kjv"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
