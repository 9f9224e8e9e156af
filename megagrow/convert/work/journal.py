"""Claims on units and marks of finished ones, as small files next to the data.

Workers, on one machine or on many over a shared file system, know of each other only through these files. A claim
appears by an exclusive link, the mark of a finished unit by a rename. Each worker keeps its claims fresh. A claim
whose process is gone, or that was not touched for `STALE` seconds, may be taken over by any worker. Two workers at
the same unit do no harm: both write the same bytes to the same places.
"""

import hashlib
import json
import os
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from megagrow import log
from megagrow.errors import CheckpointError
from megagrow.files.atomic import write_atomically

DIRECTORY = ".journal"
STALE = 60.0
"""Seconds after which an untouched claim of another machine counts as abandoned."""
FINISH = "finish"
"""Name of the claim on writing the index and publishing."""
CHECKED = "source-checked"
"""Name of the mark set when the checksums of the source's files were compared."""
SKIPPED = "checksums-skipped"
"""Name of the mark set when a run reads the source without comparing checksums."""
_BEAT = 1.0
_PLAN = "plan.json"
_LOG = log.get("convert")


class Journal:
    """The journal of one conversion.

    Attributes:
        path: its directory, inside the staging directory.
        done_bytes: bytes that this worker has written so far, in finished units or not; reported to the others.
    """

    def __init__(self, staging: Path) -> None:
        self.path = staging / DIRECTORY
        self.done_bytes = 0
        self._claims: set[str] = set()
        self._me = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._started = psutil.Process().create_time()

    def begin(self, plan: dict[str, Any], compared: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> bool:
        """Write the plan, or compare it with the existing one; return whether a conversion is resumed.

        Args:
            plan: plain values.
            compared: returns the part of a plan that must be equal; the existing one may be of an older version.

        Raises:
            CheckpointError: a conversion with another plan was started here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self._names("worker-*.bytes"):  # a living worker writes its file again within a second
            (self.path / name).unlink(missing_ok=True)
        wanted = json.loads(json.dumps(plan))
        temporary = self.path / f".{self._me}.tmp"
        temporary.write_text(json.dumps(wanted, indent=1))
        try:
            os.link(temporary, self.path / _PLAN)
            return False
        except FileExistsError:
            if changed := _difference(compared(self.plan()), compared(wanted)):
                raise CheckpointError(
                    f"{self.path.parent}: the conversion that was started here differs in {changed}; restore that, or "
                    "use --restart to throw away what it has written"
                ) from None
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def plan(self) -> dict[str, Any]:
        """The plan that `begin` wrote."""
        try:
            content = json.loads((self.path / _PLAN).read_text())
            if not isinstance(content, dict):
                raise ValueError("not keys and values")
            return content
        except ValueError as error:
            raise CheckpointError(f"{self.path / _PLAN}: damaged ({error}); --restart starts again") from None

    def claim_unit(self, unit: int) -> bool:
        """Claim a unit for this worker; False if another living worker has it."""
        return self.claim(_unit_name(unit))

    def release_unit(self, unit: int) -> None:
        """Give up the claim on a unit."""
        self.release(_unit_name(unit))

    def is_done(self, unit: int) -> bool:
        """Whether a unit is finished."""
        return (self.path / f"{_unit_name(unit)}.done").exists()

    def finish_unit(self, unit: int, written: dict[str, Any]) -> None:
        """Mark a unit as finished and release it.

        Args:
            unit: whose files are on the disk.
            written: size and hash of each of its files, by file name.
        """
        write_atomically(self.path / f"{_unit_name(unit)}.done", json.dumps(written), durable=True, shared=True)
        self.release_unit(unit)

    def finished_units(self) -> set[int]:
        """The numbers of the finished units."""
        return {_unit_of(name) for name in self._names("unit-*.done")}

    def finished(self) -> dict[int, dict[str, Any]]:
        """The files of each finished unit, as passed to `finish_unit`."""
        result = {}
        for name in self._names("unit-*.done"):
            try:
                result[_unit_of(name)] = json.loads((self.path / name).read_text())
            except ValueError as error:
                raise CheckpointError(f"{self.path / name}: damaged ({error}); --restart starts again") from None
        return result

    def note_non_finite(self, unit: int, found: Mapping[str, int]) -> None:
        """Record how many values of each tensor in a unit are not finite; must come before the unit is finished."""
        file = self.path / f"{_unit_name(unit)}.non-finite"
        if found:
            write_atomically(file, json.dumps(found), durable=True, shared=True)
        else:
            file.unlink(missing_ok=True)

    def non_finite(self) -> dict[str, int]:
        """The number of values of each tensor that are not finite, in all units."""
        total: Counter[str] = Counter()
        for name in self._names("unit-*.non-finite"):
            try:
                total.update(
                    {str(key): int(count) for key, count in json.loads((self.path / name).read_text()).items()}
                )
            except (ValueError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{self.path / name}: damaged ({error}); --restart starts again") from None
        return dict(sorted(total.items()))

    def mark(self, name: str) -> None:
        """Record for all workers that something is done."""
        (self.path / f"{name}.mark").touch()

    def marked(self, name: str) -> bool:
        """Whether any worker has set a mark."""
        return (self.path / f"{name}.mark").exists()

    def claim(self, name: str) -> bool:
        """Claim something for this worker; False if another living worker has it."""
        if not self._take(self.path / f"{name}.claim"):
            return False
        self._claims.add(name)
        return True

    def holds(self, name: str) -> bool:
        """Whether a claim still belongs to this worker, which may have lost it while it was suspended."""
        try:
            return bool(json.loads((self.path / f"{name}.claim").read_text())["worker"] == self._me)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def release(self, name: str) -> None:
        """Give up a claim."""
        self._claims.discard(name)
        if self.holds(name):
            (self.path / f"{name}.claim").unlink(missing_ok=True)

    def reported_bytes(self) -> int:
        """Bytes that all living workers have written, in finished units or not."""
        total = 0
        for name in self._names("worker-*.bytes"):
            try:
                total += int((self.path / name).read_text() or 0)
            except (OSError, ValueError):  # being written, or just removed
                continue
        return total

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Keep this worker's claims fresh and report its bytes while the block runs; then release its claims."""
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
        report = self.path / f"worker-{self._me}.bytes"
        while not stop.wait(_BEAT):
            try:
                report.write_text(str(self.done_bytes))
                for name in list(self._claims):
                    os.utime(self.path / f"{name}.claim")
            except OSError:  # published by another worker, or taken over: the work itself will notice
                continue

    def _take(self, claim: Path) -> bool:
        """Make a claim, or take over an abandoned one; False if another worker has it, or was faster."""
        content = None
        try:
            content = claim.read_text()
            reason = self._abandoned(content, self._now() - claim.stat().st_mtime)
            if not reason:
                return False
            _LOG.debug("%s: abandoned by %s: %s", claim.name, _holder(content), reason)
        except FileNotFoundError:  # nobody has it
            pass
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": self._started, "worker": self._me}
        mine = self.path / f".{self._me}.{uuid.uuid4().hex[:8]}.tmp"
        mine.write_text(json.dumps({**me, "claim": mine.name}))
        try:
            if content is not None:
                return self._take_over(claim, content, mine)
            os.link(mine, claim)  # a link, so that a claim never exists without its holder's name in it
            _LOG.debug("%s: claimed by %s", claim.name, self._me)
            return True
        except FileExistsError:
            return False
        finally:
            mine.unlink(missing_ok=True)

    def _take_over(self, claim: Path, content: str, mine: Path) -> bool:
        """Replace an abandoned claim. Only one worker may: the one that holds a claim on this very claim."""
        right = claim.with_name(f"{claim.name}.{hashlib.sha256(content.encode()).hexdigest()[:12]}")
        if not self._take(right):
            return False
        try:
            if claim.read_text() != content:  # another worker has taken it over and released its right to do so
                return False
            os.replace(mine, claim)
            _LOG.debug("%s: taken over from %s by %s", claim.name, _holder(content), self._me)
            return True
        except FileNotFoundError:  # its holder was alive after all, and released it
            return False
        finally:
            right.unlink(missing_ok=True)

    def _abandoned(self, content: str, age: float) -> str:
        """Why a claim counts as abandoned: its process is gone, or silent for too long. Empty if it does not."""
        try:
            holder = json.loads(content)
            if holder["host"] == socket.gethostname():
                process = psutil.Process(int(holder["pid"]))
                if abs(process.create_time() - float(holder["started"])) > 1.0:
                    return "another process has its pid now"
                if process.status() == psutil.STATUS_ZOMBIE:  # killed, and not yet waited for by its parent
                    return "its process was killed"
        except psutil.NoSuchProcess:
            return "its process is gone"
        except (ValueError, KeyError, TypeError):  # content lost in a power failure
            pass
        return f"untouched for {age:.0f} s" if age > STALE else ""

    def _now(self) -> float:
        """The file system's own time, since the clocks of nodes differ."""
        probe = self.path / f".{self._me}.clock"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _names(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.path.glob(pattern))


def _unit_name(unit: int) -> str:
    return f"unit-{unit:06d}"


def _unit_of(file: str) -> int:
    """The number of a unit, from the name of its `.done` file."""
    return int(file.removeprefix("unit-").removesuffix(".done"))


def _holder(content: str) -> str:
    """The name of the worker in a claim."""
    try:
        return str(json.loads(content)["worker"])
    except (ValueError, KeyError, TypeError):
        return "an unknown worker"


def _difference(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> str:
    """The first key in which two plans differ, with both values; empty if they are equal."""
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _difference(a, b, f"{prefix}{key}."):
                return found
        elif a != b:
            return f"{prefix}{key} ({a!r}, now {b!r})"
    return ""
