"""Processes and threads on a CPU, of which Accelerate's launcher starts only a part.

In: the environment of a launched program.  Out: whether to compute on the CPU, and how many were asked for.
Idea: `accelerate launch --cpu --num_processes 2` leaves several processes to mpirun and, without that, starts
one and says nothing. Training would go on with half of what was asked for; so the program starts them itself.
And a program that it starts alone gets one thread unless it is told that it is on a CPU.
Source: huggingface/accelerate issue 2741; read and tried in accelerate 1.15.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import cast

import psutil
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import parse_flag_from_env

# Set in every process that torchrun or mpirun started.
STARTED = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def on_cpu() -> bool:
    """Whether to compute on the CPU: it was asked for, or there is nothing else."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def asked_processes() -> int:
    """How many processes `accelerate launch --cpu` was told to start, where it started this one alone.

    1 under any other launcher, and where all were started.
    """
    # Accelerate sets MASTER_ADDR exactly where more than one was asked for.
    alone = "MASTER_ADDR" in os.environ and not any(name in os.environ for name in STARTED)
    parent = psutil.Process().parent()
    if not (alone and parse_flag_from_env("ACCELERATE_USE_CPU")) or parent is None:
        return 1
    return processes_in(parent.cmdline())


def processes_in(command: Sequence[str]) -> int:
    """The number of processes in the command line of `accelerate launch`; 1 for another command."""
    known = launch_arguments(command)
    if known is None:
        return 1
    if known.num_processes is None and known.config_file is not None:
        config = cast(ClusterConfig, load_config_from_file(known.config_file))
        return int(config.num_processes)
    return int(known.num_processes or 1)


def use_all_cores() -> None:
    """Give PyTorch every core, in a program that `accelerate launch` started alone on a CPU.

    The launcher sets OMP_NUM_THREADS to 1 there. Left as it is where somebody said how many threads, or where
    several processes share the cores.
    """
    parent = psutil.Process().parent()
    if parent is None or not on_cpu() or any(name in os.environ for name in STARTED):
        return
    known = launch_arguments(parent.cmdline())
    if known and known.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in parent.environ():
        torch.set_num_threads(psutil.cpu_count(logical=False) or 1)


def launch_arguments(command: Sequence[str]) -> argparse.Namespace | None:
    """What the command line of `accelerate launch` says; None for another command."""
    words = [os.path.basename(word) for word in command]
    for index, word in enumerate(words):
        if word in ("accelerate-launch", "accelerate.commands.launch") or words[index : index + 2] == [
            "accelerate",
            "launch",
        ]:
            first = index + 1 + (word == "accelerate")
            return launch_command_parser().parse_args(list(command[first:]))
    return None


def start_all(count: int, program: Sequence[str]) -> int:
    """Start `count` processes of a Python program by torchrun; returns the exit status."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
    return subprocess.run([*torchrun, *program], check=False).returncode
