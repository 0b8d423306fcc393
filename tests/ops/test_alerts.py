"""What keeps a replica from storing writes, on real brokers: each fires the alert for it on a real Prometheus, and a
replica whose writes are stored fires none. promtool sees to the times (test_dashboards.py); here they are short."""

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
# What the machine that runs this may be short of, whatever the replicas do.
OF_THE_MACHINE = {"GradestoreDisk", "GradestoreMemory"}
OF_WRITES = {("GradestoreNotWritable", None), ("GradestoreErrors", "/set lines")}
USER = "authorization {{ users: [{{ user: u, password: p, permissions: {{ publish: {{ deny: {} }} }} }}] }}"
# All ways to read a stream.
READING = ["$JS.API.CONSUMER.>", "$JS.API.STREAM.MSG.GET.>", "$JS.API.DIRECT.GET.>"]


class Alerts(unittest.TestCase):
    def setUp(self):
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.nodes, self.ended = {}, threading.Event()
        self.stack = self.enterContext(contextlib.ExitStack())
        # Cleanups run last first: writing ends before the brokers do.
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
        """Again and again; what is written fills a small store."""
        lines = "".join(json.dumps({"user_id": f"user-{n}", "spp": n}) + "\n" for n in range(1000))
        request = urllib.request.Request(f"{node.urls['write']}/set", lines.encode(), {
            "Authorization": f"Basic {AUTH}", "Content-Type": "application/x-ndjson"})
        while not self.ended.wait(PAUSE_S):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request).close()

    def small_disk(self, mib):
        """A disk in a mount namespace that ends with the process that holds it."""
        mount = f"mount -t tmpfs -o size={mib}m none /mnt && echo mounted && exec cat"
        holder = subprocess.Popen(["unshare", "--map-root-user", "--mount", "sh", "-c", mount], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, preexec_fn=end_with_parent)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        self.assertEqual(holder.stdout.readline(), b"mounted\n")
        return Path(f"/proc/{holder.pid}/root/mnt")

    def test_what_keeps_writes_from_being_stored(self):
        self.replica("healthy", self.broker("healthy").url)
        self.replica("store full", self.broker("store-full", limits="max_file_store: 1MB").url)
        self.replica("disk full", self.broker("disk-full", store=self.small_disk(mib=1)).url)
        of_two_gone, of_no_leader = self.servers("two-gone"), self.servers("no-leader")
        self.replica("two of three servers gone", of_two_gone.url, "--replicas=3")
        self.replica("no leader", of_no_leader.url, "--replicas=3")
        rights = {name: self.broker(name.replace(" ", "-"), USER.format("[]")) for name in ("no right", "reading stuck")}
        for name, broker in rights.items():
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

        for server in of_two_gone.all[1:]:
            server.kill()
        for server in of_no_leader.all:
            of_no_leader.isolate(server)
        rights["no right"].reload(USER.format('["grades.set"]'))
        rights["reading stuck"].reload(USER.format(json.dumps(READING)))

        def firing():
            found = {name: set() for name in self.nodes}
            for alert in prometheus.api("alerts")["alerts"]:
                labels = alert["labels"]
                if alert["state"] == "firing" and labels["alertname"] not in OF_THE_MACHINE:
                    found[instances[labels["instance"]]].add((labels["alertname"], labels.get("route")))
            return found

        def not_fired():
            return {name: found for name, found in firing().items() if name != "healthy" and not found >= OF_WRITES}

        until(not_fired)
        self.assertEqual(firing()["healthy"], set())


if __name__ == "__main__":
    unittest.main()
