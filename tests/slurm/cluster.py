"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of two nodes, n1 and n2.

All of it lives in one directory and is found by SLURM_CONF, so that it meets no other Slurm. It runs as whoever runs
the tests, root or not, and needs no systemd. Nodes claim more cores than there are: jobs here are small. There
is no cgroup and no accounting, and names of nodes cannot be resolved: a family here says MASTER_ADDR itself.
"""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megagrow.parent_death import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "shellcheck")
KILL_WAIT_S = 10
NODES = ("n1", "n2")
_PATIENCE_S = 120.0

_CONFIG = """\
ClusterName=megagrow
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# ranks meet at a port that follows from the job's number, and another run of these tests may share this machine
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a job that is requeued may start again after cred_expire: 2 minutes by default, 5 s at least
AuthInfo=socket={place}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1
DependencyParameters=kill_invalid_depend
ReturnToService=0
SlurmdParameters=config_overrides
SlurmdTimeout=300
KillWait={kill_wait}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 State=UNKNOWN
# nodes that would be powered up for a job: enough to ask whether a script would ever start
GresTypes=gpu
PrivateData=cloud
NodeName=g[01-16] NodeAddr=127.0.0.1 CPUs=96 RealMemory=2000000 Gres=gpu:8 State=CLOUD
NodeName=c[1-8] NodeAddr=127.0.0.1 CPUs=64 RealMemory=500000 State=CLOUD
PartitionName=gpu Nodes=g[01-16] MaxTime=3-00:00:00 State=UP
PartitionName=cpu Nodes=c[1-8] MaxTime=1-00:00:00 State=UP
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=01:00:00 State=UP
PartitionName=single Nodes=n1 MaxTime=01:00:00 State=UP
"""


def missing() -> str:
    """Why this machine cannot run a Slurm ("": it can)."""
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"{', '.join(absent)} not found: `make system` installs slurm-wlm, munge and shellcheck" if absent else ""


@contextmanager
def running() -> Iterator[None]:
    """Start a Slurm in a directory of its own and wait until its nodes are idle; stop it at the end."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    for tries_left in (2, 1, 0):
        place = Path(tempfile.mkdtemp(prefix="megagrow-slurm-"))  # pytest's own are closed to others, and to munged
        os.environ["SLURM_CONF"] = str(place / "slurm.conf")
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            _up(place, daemons)
            break
        except AssertionError:  # somebody may have taken a port since we looked
            _down(place, daemons)
            if not tries_left:
                raise
    try:
        yield
    finally:
        try:
            _wait(place, lambda: not _say("scancel", "--me") and not _say("squeue", "-h"))
        finally:
            _down(place, daemons)
            os.environ.pop("SLURM_CONF")


def _up(place: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    _write(place)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={place}/munge/{name}" for option, name in files.items()]
    daemons.append(_start(place, "munged", *options, "--num-threads=10", "--foreground"))
    _wait(place, lambda: (place / "munge" / "socket").exists())
    daemons.append(_start(place, "slurmctld", "-D", "-i"))
    daemons += [_start(place, "slurmd", "-D", "-N", name) for name in NODES]
    _wait(place, lambda: _say("sinfo", "-h", "-p", "main", "-o", "%D %t") == "2 idle")


def _down(place: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
    for daemon in reversed(daemons):
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    shutil.rmtree(place, ignore_errors=True)


def _write(place: Path) -> None:
    place.chmod(0o755)  # munged wants every user to reach its socket
    for name in ("munge", "state"):
        (place / name).mkdir(mode=0o755)
    key = place / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    host = socket.gethostname().partition(".")[0]
    user = pwd.getpwuid(os.geteuid()).pw_name
    first = random.randrange(1000, 1_000_000)
    text = _CONFIG.format(user=user, first=first, host=host, place=place, ports=ports, kill_wait=KILL_WAIT_S)
    (place / "slurm.conf").write_text(text)


def _start(place: Path, *line: str) -> subprocess.Popen[bytes]:
    with open(place / f"{line[0]}-{line[-1].strip('-')}.out", "wb") as output:
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent
        )


def _say(*line: str) -> str:
    """What a command of Slurm's prints; that it does not answer, too."""
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=15).stdout.strip()
    except subprocess.TimeoutExpired:
        return "no answer"


def _wait(place: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not ready():
        if time.monotonic() > deadline:
            texts = [f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in place.glob("*.out")]
            raise AssertionError("Slurm does not start:\n" + "\n".join(texts))
        time.sleep(0.1)
