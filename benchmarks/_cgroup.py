"""A memory cgroup (v1 or v2) for child processes: anonymous memory and page cache together stay within a limit.

Needs root, and a memory controller that may be written to.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class Cgroup:
    """A cgroup of its own, to be closed; children enter it by `enter`, as `preexec_fn`.

    Args:
        limit_bytes: of everything in it; no swap.

    Raises:
        OSError: there is no memory controller, or no permission.
    """

    def __init__(self, limit_bytes: int):
        name = f"moekit-{os.getpid()}-{time.monotonic_ns()}"
        self._one = (ROOT / "memory" / "memory.limit_in_bytes").exists()
        if self._one:
            self.path = ROOT / "memory" / name
            self.path.mkdir()
            settings = {"memory.limit_in_bytes": limit_bytes}
        else:
            with suppress(OSError):
                (ROOT / "cgroup.subtree_control").write_text("+memory")
            self.path = ROOT / name
            self.path.mkdir()
            settings = {"memory.max": limit_bytes}
        try:
            for file, value in settings.items():
                if not (self.path / file).exists():
                    raise OSError(f"no {file} in {self.path}: the memory controller is not there")
                (self.path / file).write_text(str(value))
            for file in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
                if (self.path / file).exists():
                    (self.path / file).write_text(str(limit_bytes if self._one else 0))
        except OSError:
            self.close()
            raise

    def enter(self) -> None:
        """Move the calling process into it."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int:
        """The most that it has held."""
        return int((self.path / ("memory.max_usage_in_bytes" if self._one else "memory.peak")).read_text())

    @property
    def killed(self) -> int:
        """Processes that were killed for memory."""
        lines = (self.path / ("memory.oom_control" if self._one else "memory.events")).read_text().split("\n")
        return next((int(x.split()[1]) for x in lines if x.startswith("oom_kill ")), 0)

    def close(self) -> None:
        """Remove it; nothing runs in it any more."""
        for _ in range(50):
            with suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)
