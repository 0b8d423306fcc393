"""Runs the services of a compose file with programs that are on this machine in place of images: command line, environment,
files, volumes, secrets, networks, health checks and order are the file's. Each service has a root, mounts and a network
address of its own. Wants to be root in namespaces of its own: see `make compose-test`."""

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import yaml

from measure import end_with_parent

# What a program needs of a system.
SYSTEM = ("bin", "sbin", "lib", "lib64", "usr", "dev", "proc")
PROGRAMS_AT = "/opt/bin"
UNITS_S = {"s": 1, "m": 60, "h": 3600}
POLL_S = 0.1
HARDWARE = "02:00:00:00:00:{:02x}"


def read(path, settings):
    """A compose file, with its ${NAME:-default} from these settings."""
    return yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: settings.get(*found.groups()), path.read_text()))


def seconds(text):
    return sum(int(number) * UNITS_S[unit] for number, unit in re.findall(r"(\d+)([smh])", text))


def run(*command):
    subprocess.run(command, check=True)


class Network:
    """One wire to which every service is attached. One a process, whose network is its own."""

    def __init__(self):
        run("ip", "link", "set", "lo", "up")
        # An address of its own: else it takes that of one of its ends, and another one when that end goes, and who knows
        # the old one by heart talks to nobody for half a minute.
        run("ip", "link", "add", "wire", "address", HARDWARE.format(1), "type", "bridge")
        run("ip", "address", "add", "10.77.0.1/24", "dev", "wire")
        run("ip", "link", "set", "wire", "up")
        self.addresses = self.ends = 1

    def address(self):
        self.addresses += 1
        return f"10.77.0.{self.addresses}"

    def attach(self, pid, address):
        """Gives a process this address; what takes it away again."""
        # Who has the address after a restart is known by the same hardware.
        hardware = HARDWARE.format(int(address.rsplit(".", 1)[1]))
        self.ends += 1
        end = f"end{self.ends}"
        run("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "address", hardware, "netns", str(pid))
        run("ip", "link", "set", end, "master", "wire", "up")
        # The kernel does it too, some time after the process has gone: until then there may be two with one address.
        return lambda: subprocess.run(["ip", "link", "delete", end], stderr=subprocess.DEVNULL)


class Service:
    """One of the file's services, run by `programs[image]`: what the image starts with, and programs here by their path there."""

    def __init__(self, compose, name, programs, directory):
        self.name, self.directory = name, directory / name
        self.described = compose.file["services"][name]
        self.compose = compose
        self.entrypoint, self.programs = programs[self.described["image"].split(":")[0]]
        self.address = compose.network.address()
        self.log = self.directory / "log"
        self.directory.mkdir(parents=True)
        self.child = None

    @property
    def env(self):
        return {"PATH": f"{PROGRAMS_AT}:/usr/bin:/bin:/usr/sbin:/sbin", **self.described.get("environment", {})}

    @property
    def depends_on(self):
        return list(self.described.get("depends_on", {}))

    def mounts(self):
        """What is mounted where, and whether it may be written."""
        for there, here in self.programs.items():
            yield Path(here).resolve(), there, False
        for volume in self.described.get("volumes", []):
            what, there, *mode = volume.split(":")
            if what in self.compose.file["volumes"]:
                (self.compose.directory / "volumes" / what).mkdir(parents=True, exist_ok=True)
                yield self.compose.directory / "volumes" / what, there, True
            else:
                yield self.compose.source(what), there, mode != ["ro"]
        for secret in self.described.get("secrets", []):
            yield self.compose.secret(secret), f"/run/secrets/{secret}", False
        hosts = self.directory / "hosts"
        hosts.write_text("".join(f"{address} {name}\n" for name, address in self.compose.known_to(self.name).items()))
        yield hosts, "/etc/hosts", False

    def root(self):
        """The shell commands that make this service's root directory, and enter it."""
        root = self.directory / "root"
        root.mkdir(exist_ok=True)
        yield f"mount -t tmpfs none {root}"
        for name in SYSTEM:
            if Path("/", name).is_symlink():
                yield f"ln -s {os.readlink(f'/{name}')} {root}/{name}"
            else:
                yield f"mkdir {root}/{name}; mount --rbind /{name} {root}/{name}"
        for here, there, writable in self.mounts():
            at = f"{root}{there}"
            yield f"mkdir -p {Path(at).parent}; {'mkdir -p' if here.is_dir() else 'touch'} {at}; mount --bind {here} {at}"
            if not writable:
                yield f"mount -o remount,bind,ro {at}"
        if self.described.get("read_only"):
            yield f"mount -o remount,ro {root}"
        capabilities = "setpriv --no-new-privs --bounding-set=-all --inh-caps=-all" if self.described["cap_drop"] else ""
        yield f"exec chroot {root} {capabilities} {shlex.join(self.entrypoint + self.described['command'])}"

    def start(self):
        # It waits for its end of the wire.
        network = ("echo entered", "read go", "ip link set lo up", f"ip address add {self.address}/24 dev eth0",
                   "ip link set eth0 up")
        with open(self.log, "a") as log:
            self.child = subprocess.Popen(["unshare", "--net", "--mount", "sh", "-euc", "; ".join([*network, *self.root()])],
                                          env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                          preexec_fn=end_with_parent)
        if self.child.stdout.readline() != b"entered\n":
            raise AssertionError(f"{self.name} has no root: {self.log.read_text()}")
        self.detach = self.compose.network.attach(self.child.pid, self.address)
        self.child.stdin.write(b"go\n")
        self.child.stdin.close()

    def within(self, *command):
        """Runs a command where the service runs."""
        inside = ["nsenter", "--target", str(self.child.pid), "--mount", "--net", "--root", "--wd", *command]
        return subprocess.run(inside, env=self.env, capture_output=True, text=True)

    def until_healthy(self):
        check = self.described["healthcheck"]
        kind, *command = check["test"]
        assert kind == "CMD", f"{self.name}: {kind} is not known here"
        deadline = time.monotonic() + seconds(check["start_period"])
        while (said := self.within(*command)).returncode != 0:
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} is not healthy: {said.stderr}\n{self.log.read_text()}")
            time.sleep(POLL_S)

    def kill(self):
        self.child.kill()
        self.child.wait()
        self.ended()

    def stop(self):
        """Ends it as compose does; what it exits with."""
        self.child.terminate()
        code = self.child.wait(seconds(self.described.get("stop_grace_period", "10s")))
        self.ended()
        return code

    def ended(self):
        self.child.stdout.close()
        self.detach()


class Compose:
    """A compose file. `programs` has what to run for each image, `secrets` what the files of its secrets hold, `settings` what the
    environment has."""

    def __init__(self, path, programs, secrets, settings, network, directory):
        self.path, self.file, self.directory = path, read(path, settings), directory
        self.network, self.secrets = network, secrets
        self.services = {name: Service(self, name, programs, directory) for name, service in self.file["services"].items()
                         if service["image"].split(":")[0] in programs}

    def source(self, path):
        found = (self.path.parent / path).resolve()
        assert found.exists(), f"{self.path} mounts {path}, which is not there"
        return found

    def secret(self, name):
        file = self.directory / "secrets" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(self.secrets[self.file["secrets"][name]["file"]])
        return file

    def known_to(self, name):
        """The addresses of the services that share a network with this one."""
        mine = set(self.file["services"][name]["networks"])
        return {"localhost": "127.0.0.1"} | {other.name: other.address for other in self.services.values()
                                             if mine & set(other.described["networks"])}

    def start(self, name):
        """Starts a service once what it depends on is healthy. What it depends on starts together, as with compose."""
        service = self.services[name]
        if service.child is None:
            needed = [self.services[each] for each in service.depends_on]
            for each in needed:
                self.start(each.name)
            for each in needed:
                each.until_healthy()
            service.start()

    def up(self, name):
        self.start(name)
        if "healthcheck" in self.services[name].described:
            self.services[name].until_healthy()

    def kill_all(self):
        for service in self.services.values():
            if service.child and service.child.poll() is None:
                service.kill()


def entrypoint(dockerfile):
    return json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile.read_text(), re.MULTILINE)[1])
