"""The tasks of a SLURM step (``srun -n 2 disam-peft train ...``) as the processes of one run.

SLURM starts the same command several times and tells each task its number, but not in the variables that torch reads.
Without this module every task would believe itself alone, and all would write the same files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_PORT, NUM_PORTS = 15000, 17000  # below those that systems give away by themselves


@dataclass(frozen=True)
class SlurmTask:
    """One task of a step of several.

    Attributes:
        rank: its number among all tasks.
        tasks: how many there are, at least 2.
        local_rank: its number among the tasks on its node.
        local_tasks: how many tasks its node has.
        address, port: where the tasks meet: at the first one's node, at a port that follows from the job's number.
    """

    rank: int
    tasks: int
    local_rank: int
    local_tasks: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """The environment variables by which launchers such as torchrun say the same."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.tasks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_tasks),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def slurm_task(environment: Mapping[str, str] = os.environ) -> SlurmTask | None:
    """The task that this process is; None where it is alone, where another launcher has numbered the processes, or
    where SLURM runs it as the one process of a batch script, without srun."""
    known = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys()
    rank = _number(environment, "SLURM_PROCID")
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    if known or rank is None or tasks is None or tasks < 2 or is_batch_script(environment):
        return None
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    named = [environment[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if environment.get(name)]
    if nodes is None:
        nodes = 1 if not named or re.fullmatch(r"[^\[\],]+", named[0]) else 2
    first = _first_host(named[0]) if named else environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    return SlurmTask(
        rank=rank,
        tasks=tasks,
        local_rank=_number(environment, "SLURM_LOCALID") or 0,
        local_tasks=_tasks_of_the_node(environment, tasks if nodes == 1 else 1),
        address=environment.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else first),
        port=_number(environment, "MASTER_PORT") or _port(environment),
    )


def is_batch_script(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is run by a batch script itself. A script has the variables of task 0, however many tasks
    its job may start."""
    started_by_srun = any(environment.get(name) for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"))
    return environment.get("ENVIRONMENT") == "BATCH" and not started_by_srun


def leave_the_step() -> None:
    """Let this process, and those that it starts, work alone from now on, whatever tasks run beside it."""
    os.environ.pop("SLURM_PROCID", None)


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    """The number in the first of these variables that holds one."""
    found = (environment.get(name, "") for name in names)
    return next((int(text) for text in found if text.isdecimal()), None)


def _first_host(nodes: str) -> str:
    """``node03`` of ``node[03-07,9],other``."""
    match = re.match(r"([^\[\],]+)(?:\[([^\]\-,]+)[^\]]*\])?", nodes)
    return nodes if match is None else match[1] + (match[2] or "")


def _tasks_of_the_node(environment: Mapping[str, str], otherwise: int) -> int:
    """How many tasks this task's node has, from a text such as ``2(x3),1``."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    node = _number(environment, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else otherwise


def _port(environment: Mapping[str, str]) -> int:
    """The same for all tasks of a step, and another one for the steps beside it."""
    job = _number(environment, "SLURM_JOB_ID", "SLURM_JOBID") or 0
    step = _number(environment, "SLURM_STEP_ID", "SLURM_STEPID") or 0
    return FIRST_PORT + (31 * job + step) % NUM_PORTS
