"""Two "hosts" on this machine: network namespaces joined by a virtual cable, each with its own loopback."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tiny_world import ROOT


def refused() -> str | None:
    """Why namespaces cannot be had here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "two hosts need Linux, root and the command `ip`"
    name = f"ltdi-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass(frozen=True)
class Host:
    """Programs started by `launch` see only this host's network; the disk is shared."""

    rank: int
    namespace: str
    cable: str
    main_address: str

    def launch(self, *program: object, processes: int = 2) -> subprocess.Popen[str]:
        """A program under Accelerate's launcher, one process on each of the two hosts."""
        about = {"num_machines": 2, "num_processes": processes, "machine_rank": self.rank}
        about |= {"main_process_ip": self.main_address, "main_process_port": 29555}
        options = [word for key, value in about.items() for word in (f"--{key}", str(value))]
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        config = ["--config_file", str(ROOT / "recipes/accelerate/cpu2.yaml")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": self.cable,
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *launcher, *config, *options, *map(str, program)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def die(self) -> None:
        """Kill every process of this host at once; its connections close, as when a machine is taken down."""
        said = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        for pid in said.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts 0 (the main one) and 1, and nothing left of them afterwards."""
    mark = uuid.uuid4().hex[:6]
    names, cables = [f"ltdi-{mark}-{rank}" for rank in (0, 1)], [f"l{mark}{rank}" for rank in (0, 1)]
    addresses = ("10.77.0.1", "10.77.0.2")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, addresses, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        pairs = enumerate(zip(names, cables, strict=True))
        hosts = [Host(rank, name, cable, addresses[0]) for rank, (name, cable) in pairs]
        try:
            yield hosts[0], hosts[1]
        finally:
            for host in hosts:
                host.die()  # what a failed test left running
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
