"""Faults that keep a node from storing writes, on real nats-servers: each fires its alerts on a real Prometheus, and a
healthy node fires none. The `for` of the rules is shortened here; promtool tests it (test_dashboards.py)."""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import unittest
import urllib.error
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "load"), str(ROOT / "dashboards")]

from measure import AUTH, Broker, Node, end_with_parent  # noqa: E402
from servers import Servers  # noqa: E402
from show import RULES, Prometheus, until  # noqa: E402

FOR = "3s"
PAUSE_S = 0.1
# These depend on the machine that runs the tests.
MACHINE_ALERTS = {"GradestoreDisk", "GradestoreMemory"}
WRITE_ALERTS = {("GradestoreNotWritable", None), ("GradestoreErrors", "/set lines")}
USER = "authorization {{ users: [{{ user: u, password: p, permissions: {{ publish: {{ deny: {} }} }} }}] }}"
# All ways to read a stream.
READ_SUBJECTS = ["$JS.API.CONSUMER.>", "$JS.API.STREAM.MSG.GET.>", "$JS.API.DIRECT.GET.>"]


class Alerts(unittest.TestCase):
    def setUp(self):
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.nodes, self.ended = {}, threading.Event()
        self.stack = self.enterContext(contextlib.ExitStack())
        # Cleanups run in reverse order: writing stops before NATS does.
        self.addCleanup(self.ended.set)

    def broker(self, name, more="", **options):
        return self.stack.enter_context(Broker(self.directory / name, "default", more, **options))

    def servers(self, name):
        home = self.directory / name
        home.mkdir()
        return Servers(home, "default", self.stack, proxied=True)

    def replica(self, name, url, *flags):
        home = self.directory / f"replica-{name}"
        home.mkdir()
        flags = ("--nats-url", url, "--data-dir", home, "--write-timeout=2s", *flags)
        self.nodes[name] = self.stack.enter_context(Node(home, *flags, wait=False))

    def write(self, node):
        """Writes repeatedly, which fills a small store."""
        lines = "".join(json.dumps({"user_id": f"user-{n}", "spp": n}) + "\n" for n in range(1000))
        request = urllib.request.Request(f"{node.urls['write']}/set", lines.encode(), {
            "Authorization": f"Basic {AUTH}", "Content-Type": "application/x-ndjson"})
        while not self.ended.wait(PAUSE_S):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request).close()

    def small_disk(self, mib):
        """A tmpfs in a mount namespace that ends with its holder process."""
        mount = f"mount -t tmpfs -o size={mib}m none /mnt && echo mounted && exec cat"
        holder = subprocess.Popen(["unshare", "--map-root-user", "--mount", "sh", "-c", mount], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, preexec_fn=end_with_parent)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        self.assertEqual(holder.stdout.readline(), b"mounted\n")
        return Path(f"/proc/{holder.pid}/root/mnt")

    def test_faults_that_prevent_writes_fire_their_alerts(self):
        self.replica("healthy", self.broker("healthy").url)
        self.replica("store full", self.broker("store-full", limits="max_file_store: 1MB").url)
        self.replica("disk full", self.broker("disk-full", store=self.small_disk(mib=1)).url)
        two_down, leaderless = self.servers("two-down"), self.servers("no-leader")
        self.replica("two of three servers down", two_down.url, "--replicas=3")
        self.replica("no leader", leaderless.url, "--replicas=3")
        denied = {name: self.broker(name.replace(" ", "-"), USER.format("[]")) for name in ("no permission", "no reading")}
        for name, broker in denied.items():
            self.replica(name, broker.url.replace("://", "://u:p@"))

        for node in self.nodes.values():
            node.until_ready()
            threading.Thread(target=self.write, args=(node,), daemon=True).start()

        rules = yaml.safe_load(RULES.read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                if rule["alert"] != "GradestoreAbsent":
                    rule["for"] = FOR
        rules_file = self.directory / "rules.yml"
        rules_file.write_text(yaml.safe_dump(rules))
        instances = {node.urls["ops"].removeprefix("http://"): name for name, node in self.nodes.items()}
        prometheus = self.stack.enter_context(Prometheus(self.directory, list(instances), rules_file))

        for server in two_down.all[1:]:
            server.kill()
        for server in leaderless.all:
            leaderless.isolate(server)
        denied["no permission"].reload(USER.format('["grades.set"]'))
        denied["no reading"].reload(USER.format(json.dumps(READ_SUBJECTS)))

        def firing():
            found = {name: set() for name in self.nodes}
            for alert in prometheus.api("alerts")["alerts"]:
                labels = alert["labels"]
                if alert["state"] == "firing" and labels["alertname"] not in MACHINE_ALERTS:
                    found[instances[labels["instance"]]].add((labels["alertname"], labels.get("route")))
            return found

        def missing_alerts():
            return {name: found for name, found in firing().items() if name != "healthy" and not found >= WRITE_ALERTS}

        until(missing_alerts)
        self.assertEqual(firing()["healthy"], set())


if __name__ == "__main__":
    unittest.main()
