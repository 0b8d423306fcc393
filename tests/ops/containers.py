"""Runs the services of a compose file without images, with programs of this machine: command line, environment, files,
volumes, secrets, networks, health checks and order are those of the file. Each service has its own root, mounts and
network address. Needs to be root in a user, network and mount namespace: see `make compose-test`."""

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import yaml

from measure import end_with_parent

# The directories of this machine that a program needs.
SYSTEM = ("bin", "sbin", "lib", "lib64", "usr", "dev", "proc")
PROGRAMS_AT = "/opt/bin"
UNITS_S = {"s": 1, "m": 60, "h": 3600}
POLL_S = 0.1
HARDWARE = "02:00:00:00:00:{:02x}"


def read(path, settings):
    """A compose file with its ${NAME:-default} replaced from `settings`."""
    return yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: settings.get(*found.groups()), path.read_text()))


def seconds(text):
    return sum(int(number) * UNITS_S[unit] for number, unit in re.findall(r"(\d+)([smh])", text))


def run(*command):
    subprocess.run(command, check=True)


class Network:
    """A bridge to which all services are attached. One for each process, because it uses the process' network namespace."""

    def __init__(self):
        run("ip", "link", "set", "lo", "up")
        # A fixed hardware address: otherwise the bridge takes that of one of its ports, changes it when that port is removed,
        # and cached ARP entries are wrong for half a minute.
        run("ip", "link", "add", "bridge0", "address", HARDWARE.format(1), "type", "bridge")
        run("ip", "address", "add", "10.77.0.1/24", "dev", "bridge0")
        run("ip", "link", "set", "bridge0", "up")
        self.addresses = self.ports = 1

    def address(self):
        self.addresses += 1
        return f"10.77.0.{self.addresses}"

    def attach(self, pid, address):
        """Gives a process this address; returns a function that removes it."""
        # The same hardware address after a restart, because of cached ARP entries.
        hardware = HARDWARE.format(int(address.rsplit(".", 1)[1]))
        self.ports += 1
        port = f"port{self.ports}"
        run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "address", hardware, "netns", str(pid))
        run("ip", "link", "set", port, "master", "bridge0", "up")
        # The kernel removes the port too, but some time after the process has exited: two could have one address.
        return lambda: subprocess.run(["ip", "link", "delete", port], stderr=subprocess.DEVNULL)


class Service:
    """A service of the file. `programs[image]` has the image's entrypoint, and programs of this machine by their path in the
    image."""

    def __init__(self, compose, name, programs, directory):
        self.name, self.directory = name, directory / name
        self.definition = compose.file["services"][name]
        self.compose = compose
        self.entrypoint, self.programs = programs[self.definition["image"].split(":")[0]]
        self.address = compose.network.address()
        self.log = self.directory / "log"
        self.directory.mkdir(parents=True)
        self.child = None

    @property
    def env(self):
        return {"PATH": f"{PROGRAMS_AT}:/usr/bin:/bin:/usr/sbin:/sbin", **self.definition.get("environment", {})}

    @property
    def depends_on(self):
        return list(self.definition.get("depends_on", {}))

    def mounts(self):
        """Source, target and whether it is writable, of each mount."""
        for target, source in self.programs.items():
            yield Path(source).resolve(), target, False
        for volume in self.definition.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source in self.compose.file["volumes"]:
                (self.compose.directory / "volumes" / source).mkdir(parents=True, exist_ok=True)
                yield self.compose.directory / "volumes" / source, target, True
            else:
                yield self.compose.source(source), target, mode != ["ro"]
        for secret in self.definition.get("secrets", []):
            yield self.compose.secrets[secret], f"/run/secrets/{secret}", False
        hosts = self.directory / "hosts"
        hosts.write_text("".join(f"{address} {name}\n" for name, address in self.compose.reachable_from(self.name).items()))
        yield hosts, "/etc/hosts", False

    def root(self):
        """The shell commands that create the service's root directory and run the service in it."""
        root = self.directory / "root"
        root.mkdir(exist_ok=True)
        yield f"mount -t tmpfs none {root}"
        for name in SYSTEM:
            if Path("/", name).is_symlink():
                yield f"ln -s {os.readlink(f'/{name}')} {root}/{name}"
            else:
                yield f"mkdir {root}/{name}; mount --rbind /{name} {root}/{name}"
        for source, target, writable in self.mounts():
            at = f"{root}{target}"
            yield f"mkdir -p {Path(at).parent}; {'mkdir -p' if source.is_dir() else 'touch'} {at}; mount --bind {source} {at}"
            if not writable:
                yield f"mount -o remount,bind,ro {at}"
        if self.definition.get("read_only"):
            yield f"mount -o remount,ro {root}"
        capabilities = "setpriv --no-new-privs --bounding-set=-all --inh-caps=-all" if self.definition["cap_drop"] else ""
        yield f"exec chroot {root} {capabilities} {shlex.join(self.entrypoint + self.definition['command'])}"

    def start(self):
        # The shell waits until its network interface exists.
        network = ("echo entered", "read go", "ip link set lo up", f"ip address add {self.address}/24 dev eth0",
                   "ip link set eth0 up")
        with open(self.log, "a") as log:
            self.child = subprocess.Popen(["unshare", "--net", "--mount", "sh", "-euc", "; ".join([*network, *self.root()])],
                                          env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                          preexec_fn=end_with_parent)
        if self.child.stdout.readline() != b"entered\n":
            raise AssertionError(f"{self.name} cannot create its root directory: {self.log.read_text()}")
        self.detach = self.compose.network.attach(self.child.pid, self.address)
        self.child.stdin.write(b"go\n")
        self.child.stdin.close()

    def within(self, *command):
        """Runs a command in the namespaces of the service."""
        inside = ["nsenter", "--target", str(self.child.pid), "--mount", "--net", "--root", "--wd", *command]
        return subprocess.run(inside, env=self.env, capture_output=True, text=True)

    def until_healthy(self):
        check = self.definition["healthcheck"]
        kind, *command = check["test"]
        assert kind == "CMD", f"{self.name}: healthcheck {kind} is not supported"
        deadline = time.monotonic() + seconds(check["start_period"])
        while (result := self.within(*command)).returncode != 0:
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} is not healthy: {result.stderr}\n{self.log.read_text()}")
            time.sleep(POLL_S)

    def kill(self):
        self.child.kill()
        self.child.wait()
        self.clean_up()

    def stop(self):
        """Stops it like compose; returns the exit code."""
        self.child.terminate()
        code = self.child.wait(seconds(self.definition.get("stop_grace_period", "10s")))
        self.clean_up()
        return code

    def clean_up(self):
        self.child.stdout.close()
        self.detach()


class Compose:
    """A compose file. `programs` has the program of each image, `secrets` the contents of the files of secrets, `settings` the
    environment."""

    def __init__(self, path, programs, secrets, settings, network, directory):
        self.path, self.file, self.directory = path, read(path, settings), directory
        self.network = network
        # Written once: a service that has started reads its file while others start.
        self.secrets = {}
        for name, secret in self.file["secrets"].items():
            if secret["file"] in secrets:
                self.secrets[name] = directory / "secrets" / name
                self.secrets[name].parent.mkdir(exist_ok=True)
                self.secrets[name].write_text(secrets[secret["file"]])
        self.services = {name: Service(self, name, programs, directory) for name, service in self.file["services"].items()
                         if service["image"].split(":")[0] in programs}

    def source(self, path):
        found = (self.path.parent / path).resolve()
        assert found.exists(), f"{self.path} mounts {path}, which does not exist"
        return found

    def reachable_from(self, name):
        """The addresses of the services that share a network with this one."""
        mine = set(self.file["services"][name]["networks"])
        return {"localhost": "127.0.0.1"} | {other.name: other.address for other in self.services.values()
                                             if mine & set(other.definition["networks"])}

    def start(self, name):
        """Starts a service once its dependencies are healthy. Dependencies are started together, like in compose."""
        service = self.services[name]
        if service.child is None:
            dependencies = [self.services[each] for each in service.depends_on]
            for each in dependencies:
                self.start(each.name)
            for each in dependencies:
                each.until_healthy()
            service.start()

    def up(self, name):
        self.start(name)
        if "healthcheck" in self.services[name].definition:
            self.services[name].until_healthy()

    def kill_all(self):
        for service in self.services.values():
            if service.child and service.child.poll() is None:
                service.kill()


def entrypoint(dockerfile):
    return json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile.read_text(), re.MULTILINE)[1])
