"""What is done and who is at what, as small files beside the data that is being written.

Workers, on one machine or on many over a shared file system, know of each other only by these: a claim appears by an
exclusive link, a mark of a finished unit by a rename. Each worker keeps its claims fresh; a claim whose process is
gone, or that has not been touched for `STALE` seconds, is anybody's. Two at the same unit do no harm: both write the
same bytes to the same places.
"""

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from megagrow.atomic import write_whole
from megagrow.errors import CheckpointError

DIRECTORY = ".journal"
STALE = 60.0
"""Seconds after which an untouched claim of another machine counts as abandoned."""
_BEAT = 1.0
_PLAN = "plan.json"
FINISH = "finish"
"""The claim of whoever writes the index and publishes."""
CHECKED = "source-checked"
"""The mark of whoever has compared the source's checksums."""


class Journal:
    """The journal of one conversion.

    Attributes:
        path: its directory, inside the staging directory.
        done_bytes: written by this worker so far, finished or not; told to the others.
    """

    def __init__(self, staging: Path) -> None:
        self.path = staging / DIRECTORY
        self.done_bytes = 0
        self._claims: set[str] = set()
        self._me = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._started = psutil.Process().create_time()

    def begin(self, plan: dict[str, Any]) -> bool:
        """Write what is to be done, or compare it with what was begun; return whether this goes on with that.

        Raises:
            CheckpointError: something else was begun here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self._names("worker-*.bytes"):  # who lives writes it again within a second
            (self.path / name).unlink(missing_ok=True)
        wanted = json.loads(json.dumps(plan))
        temporary = self.path / f".{self._me}.tmp"
        temporary.write_text(json.dumps(wanted, indent=1))
        try:
            os.link(temporary, self.path / _PLAN)
            return False
        except FileExistsError:
            if changed := _difference(self.plan(), wanted):
                raise CheckpointError(
                    f"{self.path.parent}: a conversion that was begun here differs in {changed}; give back what it "
                    "had, or --restart to throw away what it has written"
                ) from None
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def plan(self) -> dict[str, Any]:
        """What is being done."""
        try:
            content = json.loads((self.path / _PLAN).read_text())
            if not isinstance(content, dict):
                raise ValueError("not keys and values")
            return content
        except ValueError as error:
            raise CheckpointError(f"{self.path / _PLAN}: damaged ({error}); --restart begins again") from None

    def finished(self) -> dict[int, dict[str, Any]]:
        """What is told of each finished unit."""
        result = {}
        for name in self._names("unit-*.done"):
            try:
                result[int(name[5:-5])] = json.loads((self.path / name).read_text())
            except ValueError as error:
                raise CheckpointError(f"{self.path / name}: damaged ({error}); --restart begins again") from None
        return result

    def finished_units(self) -> set[int]:
        """The numbers of the finished units."""
        return {int(name[5:-5]) for name in self._names("unit-*.done")}

    def mark(self, name: str) -> None:
        """Note that something is done, for all to see."""
        (self.path / f"{name}.mark").touch()

    def marked(self, name: str) -> bool:
        """Whether somebody has noted it."""
        return (self.path / f"{name}.mark").exists()

    def finish(self, unit: int, told: dict[str, Any]) -> None:
        """Mark a unit, whose files are on the disk, as finished."""
        write_whole(self.path / f"unit-{unit:06d}.done", json.dumps(told), durable=True)
        self.release(f"unit-{unit:06d}")

    def claim(self, name: str) -> bool:
        """Take something for this worker; False if another that is alive has it."""
        if not self._take(self.path / f"{name}.claim"):
            return False
        self._claims.add(name)
        return True

    def holds(self, name: str) -> bool:
        """Whether a claim is still this worker's: one that slept for long may have lost it."""
        try:
            return bool(json.loads((self.path / f"{name}.claim").read_text())["worker"] == self._me)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def release(self, name: str) -> None:
        """Give a claim back."""
        self._claims.discard(name)
        if self.holds(name):
            (self.path / f"{name}.claim").unlink(missing_ok=True)

    def told_bytes(self) -> int:
        """Bytes that all living workers have written, finished or not."""
        total = 0
        for name in self._names("worker-*.bytes"):
            try:
                total += int((self.path / name).read_text() or 0)
            except (OSError, ValueError):  # being written, or just gone
                continue
        return total

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Keep this worker's claims fresh, and the others informed, as long as the block runs; then give them back."""
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), name="journal", daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            for name in list(self._claims):
                self.release(name)

    def _beat(self, stop: threading.Event) -> None:
        told = self.path / f"worker-{self._me}.bytes"
        while not stop.wait(_BEAT):
            try:
                told.write_text(str(self.done_bytes))
                for name in list(self._claims):
                    os.utime(self.path / f"{name}.claim")
            except OSError:  # published by another, or taken over: the work itself will notice
                continue

    def _take(self, claim: Path) -> bool:
        """Make a claim, or take an abandoned one over; False if another has it, or was quicker."""
        content = None
        try:
            content = claim.read_text()
            if not self._abandoned(content, self._now() - claim.stat().st_mtime):
                return False
        except FileNotFoundError:  # nobody has it
            pass
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": self._started, "worker": self._me}
        mine = self.path / f".{self._me}.{uuid.uuid4().hex[:8]}.tmp"
        mine.write_text(json.dumps({**me, "claim": mine.name}))
        try:
            if content is not None:
                return self._take_over(claim, content, mine)
            os.link(mine, claim)  # so that no claim is ever there without its holder's name
            return True
        except FileExistsError:
            return False
        finally:
            mine.unlink(missing_ok=True)

    def _take_over(self, claim: Path, content: str, mine: Path) -> bool:
        """Replace a claim that was found abandoned: only one may, who has claimed that very claim."""
        right = claim.with_name(f"{claim.name}.{hashlib.sha256(content.encode()).hexdigest()[:12]}")
        if not self._take(right):
            return False
        try:
            if claim.read_text() != content:  # another has taken it over, and given back its right to do so
                return False
            os.replace(mine, claim)
            return True
        except FileNotFoundError:  # its holder was alive after all, and gave it back
            return False
        finally:
            right.unlink(missing_ok=True)

    def _abandoned(self, content: str, age: float) -> bool:
        """Whether the process that holds a claim is gone, or has not shown itself for long."""
        try:
            holder = json.loads(content)
            if holder["host"] == socket.gethostname():
                process = psutil.Process(int(holder["pid"]))
                if abs(process.create_time() - float(holder["started"])) > 1.0:
                    return True
                if process.status() == psutil.STATUS_ZOMBIE:  # killed, and its parent has not looked yet
                    return True
        except psutil.NoSuchProcess:
            return True
        except (ValueError, KeyError, TypeError):  # lost in a power failure
            pass
        return age > STALE

    def _now(self) -> float:
        """The file system's own time: clocks of nodes differ."""
        probe = self.path / f".{self._me}.clock"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _names(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.path.glob(pattern))


def _difference(one: dict[str, Any], other: dict[str, Any], where: str = "") -> str:
    """The first place where two plans differ, with both values; an empty text: nowhere."""
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _difference(a, b, f"{where}{key}."):
                return found
        elif a != b:
            return f"{where}{key} ({a!r}, now {b!r})"
    return ""


def wait(seconds: float) -> None:
    """Let the others work."""
    time.sleep(seconds)
