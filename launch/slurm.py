"""Slurm: what a site says of its cluster, where the ranks of a recipe go on it, and what is asked of sbatch and squeue.

Nothing that a user writes becomes shell: it is an argument of sbatch or the value of a variable, both as they are, and
the scripts in slurm/ are the same for all.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import launch
from launch.folder import SUBMITTED
from launch.terminal import CommandError, printable
from parallel.recipe import MESH_DIMS, Recipe, RecipeError, did_you_mean, read_toml
from parallel.recipe.sections import Section, option

SCRIPTS = Path(launch.__path__[0]).parent / "slurm"

ASK_SECONDS = 60.0


# ---- the site ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Site(Section):
    """slurm/site.toml but for its [environment]. Texts that are empty and numbers that are 0 are left to Slurm."""

    name: str = option("", "of the cluster, as the page shows it")
    partition: str = option("", "of the jobs")
    account: str = option("", "that pays for them")
    qos: str = option("", "quality of service")
    constraint: str = option("", "features that nodes must have")
    reservation: str = option("", "whose nodes to use")
    time: str = option("", "limit of a job where --time gives none, as 2:00:00")
    gpus_per_node: int = option(0, "each is of one rank; 0: ranks are on CPUs", minimum=0, maximum=1024)
    gpu_type: str = option("", "as Slurm calls it, where a cluster has several")
    accelerator_memory: str = option("", "of one, as 80GiB: refuse what a dry run of every rank does not fit")
    ranks_per_node: int = option(0, "on CPUs", minimum=0, maximum=1024)
    launcher: Literal["torchrun", "srun"] = option("torchrun", "one torchrun a node; srun: a task for each rank")
    one_gpu_per_task: bool = option(False, "with srun: each rank sees its own GPU alone")
    cpus_per_rank: int = option(0, "CPUs of a rank", minimum=0, maximum=1024)
    memory_per_node: str = option("", "as 500G; 0: all that a node has")
    warning_seconds: int = option(120, "before the time limit: for a step and a save", minimum=1, maximum=65535)
    requeues: int = option(10, "how often a run that has checkpoints is queued again", minimum=0, maximum=10_000)
    exclusive: bool = option(False, "nodes are shared with no other job")
    python: str = option(sys.executable, "that has the lab, as the nodes (or the container) see it")
    modules: tuple[str, ...] = option((), "environment modules to load")
    container_image: str = option("", "of enroot, by the pyxis plugin of srun")
    container_mounts: tuple[str, ...] = option((), "as host:container; the folder of the lab is mounted anyway")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in vars(self).items():
            if isinstance(value, str) and "\0" in value:
                raise RecipeError(f"site.{key}", value, "give text without null characters")
        if self.one_gpu_per_task and (self.launcher != "srun" or not self.gpus_per_node):
            raise RecipeError("site.one_gpu_per_task", True, 'needs launcher = "srun" and gpus_per_node')
        if self.gpus_per_node and self.ranks_per_node not in (0, self.gpus_per_node):
            remedy = f"each of the {self.gpus_per_node} GPUs of a node is of one rank; leave it out"
            raise RecipeError("site.ranks_per_node", self.ranks_per_node, remedy)
        for key in ("modules", "container_mounts"):
            for text in getattr(self, key):
                if not text.isprintable() or not text or "," in text:
                    raise RecipeError(f"site.{key}", text, "give one in each string, without commas and line ends")

    @property
    def capacity(self) -> int:
        """Ranks of a node; 0 where the site does not say."""
        return self.gpus_per_node or self.ranks_per_node


def read_site(path: Path) -> tuple[Site, dict[str, str]]:
    """The site and its [environment]. Raises RecipeError, which names the key."""
    tables = read_toml(path)
    known = [*Site.__dataclass_fields__, "environment"]
    for key, value in tables.items():
        if key not in known:
            raise RecipeError(f"{path}: {key}", value, f"unknown key; {did_you_mean(key, known)}")
    environment = tables.pop("environment", {})
    if not isinstance(environment, dict):
        raise RecipeError(f"{path}: environment", environment, "is a section; write [environment] with variables below")
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith(("SLURM_", "SBATCH_", "LAB_")):
            raise RecipeError("environment", name, "is no variable for ranks; use letters, digits and _, as NCCL_DEBUG")
        if not isinstance(value, str) or "\0" in value:
            raise RecipeError(f"environment.{name}", value, "give text in quotes")
    return Site(**tables), environment


# ---- where ranks go ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Ranks fill one node after another."""

    nodes: int
    ranks_per_node: int


def placement(recipe: Recipe, *, capacity: int, nodes: int | None) -> Placement:
    """The recipe's ranks on `nodes`, or on as few as have room. capacity: ranks of a node; 0: as many as it takes.

    Raises RecipeError where nodes would be filled unevenly.
    """
    n = recipe.world_size
    if nodes is None:
        nodes = -(-n // capacity) if capacity else 1
    if nodes < 1 or n % nodes:
        fits = ", ".join(str(k) for k in range(1, min(n, 1024) + 1) if n % k == 0 and n // k <= (capacity or n))
        raise RecipeError("--nodes", nodes, f"does not divide the {n} ranks of {recipe.name}; use one of {fits}")
    if capacity and (n > nodes * capacity or (nodes > 1 and n < nodes * capacity)):
        remedy = f"nodes of {capacity} ranks have {nodes * capacity}, and the product of [parallel] of {recipe.name}"
        rest = f"use --nodes {n // capacity}" if n % capacity == 0 else f"make it a multiple of {capacity}"
        raise RecipeError("--nodes", nodes, f"{remedy} is {n}; {rest}")
    return Placement(nodes, n // nodes)


def dims_across(recipe: Recipe, place: Placement) -> list[str]:
    """The mesh dimensions in which ranks of different nodes talk to each other."""
    across, block = [], 1
    for dim in reversed(MESH_DIMS):  # the last varies fastest
        size = getattr(recipe.parallel, dim)
        block *= size
        # Groups of this dimension lie in blocks of so many neighbours, each from its first rank to its last.
        if size > 1 and place.ranks_per_node % block:
            across.append(dim)
    return across[::-1]


# ---- sbatch --------------------------------------------------------------------------------------------------------


def job_options(site: Site, place: Placement, *, name: str, time: str | None) -> list[str]:
    """Options of sbatch for a job that trains."""
    ranks = place.ranks_per_node
    by_torchrun = site.launcher == "torchrun"
    gpus = site.gpu_type and f"{site.gpu_type}:"
    given = {
        "nodes": str(place.nodes),
        "ntasks-per-node": "1" if by_torchrun else str(ranks),
        "gpus-per-task": f"{gpus}1" if site.one_gpu_per_task else "",
        "gpus-per-node": f"{gpus}{ranks}" if site.gpus_per_node and not site.one_gpu_per_task else "",
        "cpus-per-task": str(site.cpus_per_rank * (ranks if by_torchrun else 1)) if site.cpus_per_rank else "",
        "mem": site.memory_per_node,
        "time": time or site.time,
        "signal": f"B:USR1@{site.warning_seconds}",
    }
    return [*_of_site(site, name), *_written(given), "--requeue", *["--exclusive"] * site.exclusive]


def report_options(site: Site, *, name: str) -> list[str]:
    """Options of sbatch for the job that makes a table and a page."""
    return [*_of_site(site, name), *_written({"nodes": "1", "ntasks": "1", "time": "10"})]


def _of_site(site: Site, name: str) -> list[str]:
    given = {key: getattr(site, key) for key in ("partition", "account", "qos", "constraint", "reservation")}
    return _written({"job-name": name, **given})


def _written(given: Mapping[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in given.items() if value]


def variables(site: Site, place: Placement) -> dict[str, str]:
    """What the scripts find in their environment."""
    given = {
        "LAB_PYTHON": site.python,
        "LAB_SCRIPTS": str(SCRIPTS),
        "LAB_RANKS_PER_NODE": str(place.ranks_per_node),
        "LAB_WARNING_SECONDS": str(site.warning_seconds),
        "LAB_REQUEUES": str(site.requeues),
        "LAB_MODULES": "\n".join(site.modules),
        "LAB_CONTAINER": site.container_image,
        "LAB_MOUNTS": ",".join(site.container_mounts),
        "PARALLEL_LAB_CLUSTER": site.name,
    }
    return {key: value for key, value in given.items() if value}


@dataclass(frozen=True)
class Submission:
    """A script of slurm/ with its arguments, options of sbatch, and variables."""

    script: str
    arguments: Sequence[str]
    options: Sequence[str]
    environment: Mapping[str, str]

    def submit(self, folder: Path, *more_options: str) -> str:
        """The number of the job, whose log will be in `folder`. Raises CommandError with what Slurm says."""
        command = ["sbatch", "--parsable", *more_options, *self._command(folder)]
        return ask_slurm(command, self.environment).split(";")[0].strip()  # a federation adds the name of a cluster

    @contextlib.contextmanager
    def held(self, folder: Path) -> Iterator[str]:
        """The job, which begins after the block, if that ends well, and else never."""
        job = self.submit(folder, "--hold")
        try:
            yield job
            ask_slurm(["scontrol", "release", job])
        except BaseException:
            ask_slurm(["scancel", job])
            raise

    def as_shell(self, folder: Path, *more_options: str) -> str:
        """The same as one might write it in a shell."""
        exports = [f"export {key}={shlex.quote(value)}" for key, value in self.environment.items()]
        words = [*more_options, *self._command(folder)]
        return "\n".join([*exports, " \\\n    ".join(["sbatch", *map(shlex.quote, words)])])

    def _command(self, folder: Path) -> list[str]:
        # In a file's name %j is the number of the job, %% a percent sign, and a backslash turns all of these off.
        if "\\" in str(folder) or not str(folder).isprintable():
            raise RecipeError("--out", str(folder.parent), "sbatch takes no backslash and no line end; give another")
        array = any(option.startswith("--array") for option in self.options)
        log = f"{str(folder).replace('%', '%%')}/logs/slurm-{'%A_%a' if array else '%j'}.log"
        common = ["--export=ALL", f"--output={log}", "--open-mode=append"]
        return [*self.options, *common, str(SCRIPTS / self.script), *self.arguments]


def ask_slurm(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command of Slurm prints. Raises CommandError, in one line."""
    try:
        answer = subprocess.run(
            command, env=os.environ | dict(environment or {}), capture_output=True, text=True, timeout=ASK_SECONDS
        )
    except FileNotFoundError:
        raise CommandError(f"{command[0]}: not found; this is no host from which Slurm takes jobs") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{command[0]}: no answer in {ASK_SECONDS:g} s; is slurmctld up? (scontrol ping)") from None
    if answer.returncode != 0:
        said = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in answer.stderr.splitlines()]
        raise CommandError(f"{command[0]}: {printable('; '.join(said)) or f'exit code {answer.returncode}'}")
    return answer.stdout


# ---- squeue --------------------------------------------------------------------------------------------------------

FIELDS = ("JobArrayID", "State", "Reason", "RestartCnt", "NodeList", "exit_code")
OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE"),
    *("NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
)


def jobs(numbers: Sequence[str]) -> dict[str, dict[str, str]]:
    """What Slurm knows of these jobs and of the tasks of arrays among them, by "12" or "12_3": FIELDS.

    One that ended some minutes ago (MinJobAge) is forgotten. Raises CommandError where Slurm does not answer.
    """
    # Several, as squeue takes one that is forgotten among others for no error.
    command = ["squeue", "--noheader", "--states=all", "--array", f"--jobs={','.join([*numbers, *numbers])}"]
    try:
        text = ask_slurm([*command, f"--Format={','.join(f'{field}:|' for field in FIELDS)}"])
    except CommandError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    rows = (dict(zip(FIELDS, (word.strip() for word in line.split("|")), strict=False)) for line in text.splitlines())
    return {row["JobArrayID"]: row for row in rows if len(row) == len(FIELDS)}


def submitted(folder: Path) -> dict[str, Any] | None:
    """What `lab submit` has noted in `folder`: {job, report, tasks: {variant: its task}}; None where it has nothing."""
    try:
        noted = json.loads((folder / SUBMITTED).read_text(encoding="utf-8"))
        tasks = {str(name): str(task) for name, task in noted["tasks"].items()}
        numbers = [noted["job"], *filter(None, [noted["report"]]), *tasks.values()]
        if not all(isinstance(number, str) and re.fullmatch(r"[0-9]+(_[0-9]+)?", number) for number in numbers):
            return None
        return {"job": noted["job"], "report": noted["report"], "tasks": tasks}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
