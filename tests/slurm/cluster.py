"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of two nodes, n1 and n2.

All its files are in one directory and commands find it through SLURM_CONF, so it cannot interfere with another Slurm.
It runs as the user who runs the tests, root or not, and needs no systemd. The nodes claim more cores than the machine
has, because the jobs are small. There is no cgroup and no accounting, and the names of the nodes cannot be resolved, so
families in these tests set MASTER_ADDR themselves.
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
_TIMEOUT_S = 120.0

_CONFIG = """\
ClusterName=megagrow
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# the port of the ranks is derived from the job's number, and another run of these tests may share this machine
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a job that is requeued may start again after cred_expire: 2 minutes by default, 5 s at least
AuthInfo=socket={directory}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
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
# nodes that would be powered up for a job: enough to check whether a script could ever start
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
    """The reason why this machine cannot run a Slurm; empty if it can."""
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"{', '.join(absent)} not found: `make system` installs slurm-wlm, munge and shellcheck" if absent else ""


@contextmanager
def running() -> Iterator[None]:
    """Start a Slurm in a new directory and wait until its nodes are idle; stop it at the end."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    for tries_left in (2, 1, 0):
        # not a directory of pytest's: those are closed to other users, and so to munged
        directory = Path(tempfile.mkdtemp(prefix="megagrow-slurm-"))
        os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            _start_daemons(directory, daemons)
            break
        except AssertionError:  # another process may have taken a port in the meantime
            _stop_daemons(directory, daemons)
            if not tries_left:
                raise
    try:
        yield
    finally:
        try:
            _wait_until(directory, lambda: not _output("scancel", "--me") and not _output("squeue", "-h"))
        finally:
            _stop_daemons(directory, daemons)
            os.environ.pop("SLURM_CONF")


def _start_daemons(directory: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    _write_configuration(directory)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={directory}/munge/{name}" for option, name in files.items()]
    daemons.append(_start_daemon(directory, "munged", *options, "--num-threads=10", "--foreground"))
    _wait_until(directory, lambda: (directory / "munge" / "socket").exists())
    daemons.append(_start_daemon(directory, "slurmctld", "-D", "-i"))
    daemons += [_start_daemon(directory, "slurmd", "-D", "-N", name) for name in NODES]
    _wait_until(directory, lambda: _output("sinfo", "-h", "-p", "main", "-o", "%D %t") == "2 idle")


def _stop_daemons(directory: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
    for daemon in reversed(daemons):
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    shutil.rmtree(directory, ignore_errors=True)


def _write_configuration(directory: Path) -> None:
    directory.chmod(0o755)  # munged requires that every user can reach its socket
    for name in ("munge", "state"):
        (directory / name).mkdir(mode=0o755)
    key = directory / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    host = socket.gethostname().partition(".")[0]
    user = pwd.getpwuid(os.geteuid()).pw_name
    first = random.randrange(1000, 1_000_000)
    text = _CONFIG.format(user=user, first=first, host=host, directory=directory, ports=ports, kill_wait=KILL_WAIT_S)
    (directory / "slurm.conf").write_text(text)


def _start_daemon(directory: Path, *line: str) -> subprocess.Popen[bytes]:
    with open(directory / f"{line[0]}-{line[-1].strip('-')}.out", "wb") as output:
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent
        )


def _output(*line: str) -> str:
    """The output of a Slurm command, or a note that it did not answer."""
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=15).stdout.strip()
    except subprocess.TimeoutExpired:
        return "no answer"


def _wait_until(directory: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not ready():
        if time.monotonic() > deadline:
            texts = [f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in directory.glob("*.out")]
            raise AssertionError("Slurm did not start:\n" + "\n".join(texts))
        time.sleep(0.1)
