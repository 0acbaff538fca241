"""A Slurm of four nodes on this machine, for tests: munge, slurmctld and slurmd of Debian, up in about a second.

    with Testbed() as slurm:
        slurm("srun", "--nodes=2", "hostname")      # a command of its login node, as subprocess.run
        slurm.do("kill n1")                         # a node loses power; start n1; kill slurmctld; start slurmctld

The cluster is one process, this file run with a folder, and all else is below it. It ends with its stdin: when whoever
started it ends, even by SIGKILL, no process, network or file of it is left.

Where this user may make namespaces (namespaces(7): root of a machine, and of most containers), each node is a host of
its own, with a name, a network, processes and /dev/shm that nobody else sees. Where not, nodes are daemons on ports of
their own: jobs run, but the names of nodes do not resolve, so that ranks of two nodes cannot meet.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SBIN = "/usr/sbin:/sbin"
NODES = ("n1", "n2", "n3", "n4")
GPUS = 4  # of a node: links to /dev/null that nobody opens
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
NEW_HOST = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL")
TRY = "mount -t tmpfs none /run && ip link add bridge type bridge && ip link add veth type veth"

# Seconds are short, as tests wait for them: those after which a node that is silent counts as down, and between TERM
# and KILL. cred_expire is also how long a job that was requeued must wait.
CONFIGURATION = """
ClusterName=testbed
SlurmctldHost={controller}
SlurmctldPort={port}
CommunicationParameters={binding}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=3
MessageTimeout=5
KillWait=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=2
"""

# Slurm finds the processes of a job by parentage, from which orphans escape; its daemon of a step adopts them here,
# and so ends what a cgroup ends on a real cluster. The flag outlives exec.
STEP_DAEMON = """#!{python} -SE
import ctypes, os, sys
ctypes.CDLL(None).prctl({subreaper}, 1, 0, 0, 0)
os.execv({stepd!r}, ["slurmstepd", *sys.argv[1:]])
"""


def missing() -> list[str]:
    """The programs that the testbed needs and this machine lacks."""
    needed = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
    return [program for program in needed if not shutil.which(program, path=f"{os.environ['PATH']}:{SBIN}")]


class Testbed:
    """The cluster, and its login node."""

    __test__ = False  # it is none, for all its name

    def __init__(self, *, hosts: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket has at most 107 characters
        inside = [*NEW_HOST, "--net"]
        self.has_hosts = hosts and subprocess.run([*inside, "sh", "-c", TRY], capture_output=True).returncode == 0
        command = [*(inside if self.has_hosts else []), sys.executable, "-P", __file__, str(self.folder)]
        environment = os.environ | {"PATH": f"{os.environ['PATH']}:{SBIN}", "SLURM_CONF": f"{self.folder}/slurm.conf"}
        self.environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __enter__(self) -> "Testbed":
        self._wait_until_ready("start")
        return self

    def __exit__(self, *error: Any) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def do(self, what: str) -> None:
        """kill or start n1, n2, n3, n4 or slurmctld; returns when that is done."""
        assert self.process.stdin
        self.process.stdin.write(f"{what}\n")
        self._wait_until_ready(what)

    def _wait_until_ready(self, what: str) -> None:
        assert self.process.stdout
        answer = self.process.stdout.readline().strip()
        assert answer == "ready", f"{what}: {answer or 'the testbed ended'}"

    def login(self, *command: str) -> list[str]:
        """`command` as one that starts it on the login node."""
        inside = [f"--{kind}=/proc/{self.process.pid}/ns/{proc}" for kind, proc in (("net", "net"), ("uts", "uts"))]
        inside.append(f"--mount=/proc/{self.process.pid}/ns/mnt")
        return ["nsenter", *inside, f"--wd={os.getcwd()}", "--", *command] if self.has_hosts else [*command]

    def __call__(
        self, *command: str, check: bool = True, timeout: float = 60, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        if cwd := more.pop("cwd", None):
            command = ("env", f"--chdir={cwd}", *command)
        answer = subprocess.run(
            self.login(*command), env=self.environment | dict(env or {}), capture_output=True, text=True,
            timeout=timeout, **more,
        )  # fmt: skip
        assert not check or answer.returncode == 0, f"{' '.join(command)}: {answer.stdout}{answer.stderr}"
        return answer

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Reason, ExitCode, Restarts, ..."""
        line = self("scontrol", "-o", "show", "job", str(number)).stdout.splitlines()[0]
        return dict(word.partition("=")[::2] for word in line.split())

    def wait_for(self, number: int | str, *states: str, seconds: float = 60) -> dict[str, str]:
        """The job, once it is in one of these states."""
        wait_until(lambda: self.job(number)["JobState"] in states, seconds, lambda: str(self.job(number)))
        return self.job(number)

    def clear(self) -> None:
        """Ends all jobs, and waits until all nodes are idle."""
        for line in self("squeue", "--noheader", "--format=%i").stdout.split():
            self("scancel", "--full", "--signal=KILL", line, check=False)
            self("scancel", line, check=False)
        command = ("sinfo", "--noheader", "--partition=main", "--Node", "--format=%N %T")
        wait_until(lambda: self(*command).stdout.count(" idle\n") == len(NODES), 60, lambda: self(*command).stdout)


def wait_until(true: Callable[[], bool], seconds: float, what: Callable[[], str] | str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


# ---- the process of the cluster ------------------------------------------------------------------------------------


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder, self.has_hosts = folder, os.getpid() == 1
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("log", "state", "gpus", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        if self.has_hosts:
            self._connect()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        places = {"socket": "sock", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        files = [f"--{option}={self.folder}/munge.{end}" for option, end in places.items()]
        # --force: it would not trust a folder below /tmp
        self._run("munged", "munged", "--foreground", "--force", "--num-threads=2", *files)
        wait_until((self.folder / "munge.sock").exists, 10, "no socket of munged")
        for name in ("slurmctld", *NODES):
            self.obey("start", name)
        wait_until(self._all_idle, 30, lambda: self._sinfo() + self._logs())

    def obey(self, verb: str, name: str) -> None:
        if verb == "kill":
            self.daemons[name].kill()  # of a node, all that runs there ends, too
            self.daemons[name].wait()
        elif name == "slurmctld":
            self._run(name, name, "-D")
            wait_until(lambda: "is UP" in self._ask("scontrol", "ping"), 20, self._logs)
        else:
            slurmd = f"slurmd -D -d {self.folder}/slurmstepd -N {name}"
            # bash is the first process of the node, whose task it is to wait for those that others have left
            on_host = ["nsenter", f"--net=/run/netns/{name}", *NEW_HOST, "--mount-proc", "bash", "-c"]
            its_own = f"hostname {name}; mount -t tmpfs none /dev/shm; {slurmd} & wait $!"
            self._run(name, *([*on_host, its_own] if self.has_hosts else slurmd.split()))

    def _configure(self) -> None:
        folder, ports = self.folder, _free_ports(1 + len(NODES))
        if self.has_hosts:
            subprocess.run(["hostname", "login"], check=True)
        address = "10.213.0.254" if self.has_hosts else "127.0.0.1"
        places = {node: f"10.213.0.{i}" if self.has_hosts else address for i, node in enumerate(NODES, start=1)}
        of_node = f"CPUs=16 RealMemory=64000 Gres=gpu:{GPUS} State=UNKNOWN"
        nodes = [
            f"NodeName={node} NodeAddr={place} Port={port} {of_node}"
            for (node, place), port in zip(places.items(), ports[1:], strict=True)
        ]
        settings = {
            "controller": f"{socket.gethostname().split('.')[0]}({address})",
            # Not NoInAddrAny on hosts of their own: srun would listen where its host's name points to, and hang.
            "binding": "NoCtldInAddrAny" if self.has_hosts else "NoInAddrAny",
            "user": subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip(),
        }
        text = CONFIGURATION.format(folder=folder, port=ports[0], nodes="\n".join(nodes), **settings)
        (folder / "slurm.conf").write_text(text)
        for i in range(GPUS):
            (folder / "gpus" / f"gpu{i}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu File={folder}/gpus/gpu[0-{GPUS - 1}]\n")
        stepd = os.path.realpath(shutil.which("slurmstepd") or "/usr/sbin/slurmstepd")
        wrapper = STEP_DAEMON.format(python=sys.executable, subreaper=PR_SET_CHILD_SUBREAPER, stepd=stepd)
        (folder / "slurmstepd").write_text(wrapper)
        (folder / "slurmstepd").chmod(0o755)
        lines = [f"{place} {name}\n" for name, place in {"localhost": "127.0.0.1", "login": address, **places}.items()]
        (folder / "hosts").write_text("".join(lines))

    def _connect(self) -> None:
        """A bridge, and for each node a network with one cable to it. All are gone with this process."""
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no DNS to wait for
        script = [
            f"mount --bind {self.folder}/hosts /etc/hosts",
            f"mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf",
            "mount -t tmpfs none /run",  # `ip netns` keeps names there
            "mkdir /run/full && mount -t tmpfs -o size=1m none /run/full",
            "ip link set lo up",
            "ip link add bridge type bridge && ip addr add 10.213.0.254/24 dev bridge && ip link set bridge up",
        ]
        for i, node in enumerate(NODES, start=1):
            script += [
                f"ip netns add {node} && ip link add {node} type veth peer name eth0 netns {node}",
                f"ip link set {node} master bridge up && ip -n {node} addr add 10.213.0.{i}/24 dev eth0",
                f"ip -n {node} link set eth0 up && ip -n {node} link set lo up",
            ]
        subprocess.run(["sh", "-e", "-c", "\n".join(script)], check=True)

    def _run(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout

    def _sinfo(self) -> str:
        return self._ask("sinfo", "--noheader", "--partition=main", "--Node", "--format=%N %T %E")

    def _all_idle(self) -> bool:
        for name, daemon in self.daemons.items():
            assert daemon.poll() is None, f"{name} ended\n{self._logs()}"
        return self._sinfo().count(" idle ") == len(NODES)

    def _logs(self) -> str:
        logs = sorted((self.folder / "log").iterdir())
        return " | ".join(line for log in logs for line in log.read_text(errors="replace").splitlines()[-3:])

    def end(self) -> None:
        """Where nodes are hosts, what a daemon has started ends with it; where not, this process adopts it."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        while not self.has_hosts and (adopted := Path("/proc/thread-self/children").read_text().split()):
            for pid in map(int, adopted):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: pytest, which gets it too, ends this at its end
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    cluster = Cluster(folder)
    try:
        cluster.start()
        print("ready", flush=True)
        for line in sys.stdin:
            cluster.obey(*line.split())
            print("ready", flush=True)
    except BaseException as error:
        print(" ".join(f"{type(error).__name__}: {error}".split()), flush=True)
    finally:
        cluster.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
