"""`python -m moekit` is `moekit`."""

from moekit.cli import main

main()
