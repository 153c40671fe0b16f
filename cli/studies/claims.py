"""Who does which run: a claim file in the run's directory, with a heartbeat, taken over when its owner is gone.

Claims are looked at, taken and given back under one file lock of the study, so that two runners never both take over
what a third left behind. An owner on this machine is gone when its process is; one elsewhere, when its heartbeat has
stopped for `STALE` seconds. Ages are differences of two files' times on the study's own file system: clocks of machines
may differ.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

HEARTBEAT, STALE = 10.0, 120.0
CLAIM = "claim"


class ClaimError(RuntimeError):
    """The file system cannot keep two runners apart."""


@dataclass(frozen=True)
class Owner:
    """A process, told from every other one, also from a later one with its number."""

    host: str
    pid: int
    started: float
    token: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(_host(), os.getpid(), psutil.Process().create_time(), uuid.uuid4().hex)

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended; of another machine's processes nothing is known."""
        if self.host != _host():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.partition('/')[0]}"


class Claims:
    """The claims of one runner in a study's directory.

    Args:
        lost: called with a run's id, in the heartbeat's thread, when a claim of ours has been taken over.
    """

    def __init__(self, root: Path, lost: Callable[[str], None] = lambda run: None) -> None:
        self.owner = Owner.here()
        self._root, self._lost = root, lost
        self._held: dict[str, Path] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for run in list(self._held):
            self.release(run)

    def take(self, run: str, wanted: Callable[[], bool]) -> bool:
        """Claim a run if it is still `wanted`, which is asked under the lock, and nobody at work has it."""
        path = self._root / "runs" / run / CLAIM
        with self.locked():
            if not wanted() or self.held_by(run) is not None:
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with open(path, "x", encoding="utf-8") as stream:
                json.dump(asdict(self.owner), stream)
                stream.flush()
                os.fsync(stream.fileno())
            self._held[run] = path
        return True

    def holds(self, run: str) -> bool:
        """Whether a run is ours still."""
        owner = _read(self._root / "runs" / run / CLAIM)
        return owner is not None and owner.token == self.owner.token

    def release(self, run: str) -> None:
        """Give a run back."""
        path = self._held.pop(run)
        with self.locked():
            if self.holds(run):
                path.unlink(missing_ok=True)

    def held_by(self, run: str) -> Owner | None:
        """Who is at work on a run, as far as can be told."""
        path = self._root / "runs" / run / CLAIM
        owner = _read(path)
        if owner is None or owner.gone:
            return None
        if owner.host == _host():
            return owner
        return owner if self._age(path) < STALE else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all runners of the study, for as long as it takes to look and to write a claim.

        Raises:
            ClaimError: the file system has no locks.
        """
        with open(self._root / ".lock", "a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                raise ClaimError(
                    f"{self._root} is on a file system without locks ({error.strerror}), where two runners could do "
                    "one run twice. Put the study elsewhere, or mount that file system with locks (Lustre: -o flock)."
                ) from error
            yield  # the lock goes with the file's closing, also that of a process that dies

    def _age(self, path: Path) -> float:
        probe = self._root / f".now-{self.owner.token}"
        probe.touch()
        try:
            return probe.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:  # given back meanwhile
            return STALE
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            for run, path in list(self._held.items()):
                if self.holds(run):
                    os.utime(path)
                elif run in self._held:
                    self._lost(run)


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # not there; or its writer died over it, which holds the lock
        return None


def _host() -> str:
    """This machine since it was started, and the namespace that process numbers are of: containers have their own."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text().strip())
        except OSError:  # not Linux
            parts.append("")
    return "/".join(parts)


def wait_a_moment() -> None:
    """Between two looks at what others are doing."""
    time.sleep(1.0)
