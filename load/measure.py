"""Shared by the load tests: nodes, NATS, wrk, and the CPU time of everything else on the machine."""

import base64
import ctypes
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "target" / os.environ.get("PROFILE", "release")
PROGRAM = os.environ.get("PROGRAM", BUILT / "gradestore")
SERVER = ROOT / ".tools" / "bin" / "nats-server"
SYNCS = {"default": "2m", "always": "always"}
PASSWORD = "compare"
AUTH = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
CPUCLOCK_SCHED = 2
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# The machine is quiet while everything else on it uses less than this share of a core.
OTHERS_QUIET = 0.08
QUIET_WAIT_S_MAX = 20


def cpu_s(pid):
    """The CPU time of a process in nanosecond resolution; /proc counts in hundredths of a second. The clock id is
    that of clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)


def machine_cpu_s():
    """The CPU time of all processes: user, nice, system, irq, softirq, and steal by other machines."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK_S


def own_cpu_s(*servers):
    us = os.times()
    own = us.user + us.system + us.children_user + us.children_system
    return own + sum(cpu_s(server.pid) for server in servers)


class Others:
    """The CPU time of everything else on the machine, in cores, while one round runs."""

    def __init__(self, *servers):
        self.servers = servers
        deadline = time.monotonic() + QUIET_WAIT_S_MAX
        while True:
            self.begin()
            time.sleep(1)
            if self.cores() < OTHERS_QUIET or time.monotonic() > deadline:
                break
        self.begin()

    def begin(self):
        self.began = time.monotonic()
        self.before = machine_cpu_s() - own_cpu_s(*self.servers)

    def cores(self):
        used = machine_cpu_s() - own_cpu_s(*self.servers) - self.before
        return max(used, 0) / (time.monotonic() - self.began)


LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def end_with_parent():
    """Runs in the child before its program: the child is killed when this process ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# Below Linux' ephemeral ports, so that no outgoing connection and no bind to port 0 takes the port of a process that
# binds later or restarts.
PORTS = range(20_000, 32_768)
RESERVED_PORTS = []


def free_port():
    """A TCP port that stays reserved until this process ends. The reservation is the UDP port of the same number: all
    callers see it, and the TCP port can be bound repeatedly."""
    while True:
        port = random.choice(PORTS)
        reserved = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            reserved.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            reserved.close()
            continue
        RESERVED_PORTS.append(reserved)
        return port


def says(*command):
    """The first line of a command's output."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[0]


class Broker:
    """nats-server on its own port. `more` is added to its configuration, `limits` to that of JetStream."""

    def __init__(self, directory, sync, more="", store=None, limits=""):
        directory.mkdir()
        port = free_port()
        self.address = ("127.0.0.1", port)
        self.url = f"nats://127.0.0.1:{port}"
        self.config, self.log = directory / "nats.conf", directory / "nats.log"
        self.store = store or directory / "store"
        self.base = (f'listen: 127.0.0.1:{port}\n'
                     f'jetstream {{ store_dir: "{self.store}", sync_interval: "{SYNCS[sync]}", {limits} }}\n')
        self.config.write_text(self.base + more)
        self.command = [SERVER, "-c", self.config, "-l", self.log]
        self.start()

    def start(self):
        self.log.unlink(missing_ok=True)
        self.child = subprocess.Popen(self.command, preexec_fn=end_with_parent)
        self.pid = self.child.pid
        while not self.log.exists() or "Server is ready" not in self.log.read_text():
            if self.child.poll() is not None:
                sys.exit(f"nats-server ended: {self.log.read_text()}")
            time.sleep(0.05)

    def reload(self, more):
        """Replaces the added configuration."""
        self.config.write_text(self.base + more)
        self.child.send_signal(signal.SIGHUP)

    def kill(self):
        """kill -9."""
        self.child.kill()
        self.child.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # A stopped process does not receive another signal.
        self.child.send_signal(signal.SIGCONT)
        self.child.terminate()
        self.child.wait()


class Node:
    """A node on free ports. Waits until it is ready, unless `wait` is false; `core` pins it to one core."""

    def __init__(self, directory, *flags, wait=True, core=None):
        self.log = Path(directory) / "node.log"
        addresses = {port: f"127.0.0.1:{free_port()}" for port in ("write", "read", "ops")}
        self.urls = {port: f"http://{address}" for port, address in addresses.items()}
        self.command = [*pinned(core), PROGRAM, "serve", *flags,
                        *(f"--{port}-addr={address}" for port, address in addresses.items())]
        self.start()
        if wait:
            self.until_ready()

    def start(self):
        env = dict(os.environ, GRADESTORE_PASSWORD=PASSWORD)
        with open(self.log, "a") as log:
            self.child = subprocess.Popen(self.command, env=env, stdout=log, stderr=log, preexec_fn=end_with_parent)
        self.pid = self.child.pid

    def kill(self):
        """kill -9."""
        self.child.kill()
        self.child.wait()

    def until_ready(self):
        while not self.ready():
            if self.child.poll() is not None:
                sys.exit(f"the node ended: {self.log.read_text()}")
            time.sleep(0.02)

    def ready(self):
        try:
            return self.ask("/readyz/write") == "ready\n"
        except OSError:
            # It does not listen yet, or responds with 503.
            return False

    def ask(self, path):
        return urllib.request.urlopen(self.urls["ops"] + path, timeout=10).read().decode()

    def status(self):
        return json.loads(self.ask("/status"))

    def metric(self, name):
        return float(re.search(rf"^{name} (\S+)$", self.ask("/metrics"), re.MULTILINE)[1])

    def rss_mib(self):
        return memory_mib(self.pid, "VmRSS")

    def curl_backup(self, to):
        return ["curl", "-sSf", "-u", f"admin:{PASSWORD}", "-o", to, self.urls["write"] + "/backup"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait()


def last_line(out):
    """The numbers in the last output line of a load tool, by name."""
    return {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", out.splitlines()[-1])}


def pinned(core):
    return [] if core is None else ["taskset", "-c", str(core)]


def memory_mib(pid, what):
    """VmRSS, the resident memory of a process, or VmHWM, its maximum."""
    return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def wrk(script, url, seed, args, connections=None, core=None, delay_ms=0, users=None, seconds=None, **env):
    """One run of wrk: the numbers of its last line, and the rate."""
    env = dict(os.environ, USERS=str(users or args.users), SEED=str(seed), AUTH=AUTH, DELAY_MS=str(delay_ms), **env)
    out = subprocess.run([*pinned(core), "wrk", "-t1", f"-c{connections or args.connections}", f"-d{seconds or args.seconds}s",
                          "-s", ROOT / "load" / script, url],
                         env=env, check=True, capture_output=True, text=True).stdout
    row = last_line(out)
    if row["errors"]:
        sys.exit(f"{row['errors']} failed requests against {url}:\n{out}")
    return dict(row, rate=row["requests"] / (row["duration_us"] / 1e6))


# The goals so far, for the final table.
DEMANDED = []


def demand(what, found, sign, bound):
    met = found >= bound if sign == ">=" else found <= bound
    print(f"demand: {what} {sign} {bound}: {found:.3f}, {'met' if met else 'MISSED'}", flush=True)
    DEMANDED.append((what, found, sign, bound, met))
    return int(not met)
