"""The k6 scripts and the data generator on real nodes: each script passes on a cluster, and the smoke test on one node too."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "load"))

import generate  # noqa: E402
from measure import PASSWORD, Broker, Node  # noqa: E402

K6 = ROOT / ".tools" / "bin" / "k6"
SCRIPTS = ROOT / "load" / "k6"
# Little load, because the machine may be busy. Latency is not tested here.
LIGHT = {"RATE": "40", "DURATION": "2s", "SPIKE_DURATION": "1s", "BACKUP_EVERY": "1s", "USERS": "300", "P99_MS": "5000"}
ALL_CHECKS_MET = ("met     checks: rate==1", "met     http_req_failed: rate==0")


def k6(script, **env):
    return subprocess.run([K6, "run", "--quiet", "--no-usage-report", SCRIPTS / script],
                          env=os.environ | env, capture_output=True, text=True)


def address(node):
    host, write = node.urls["write"].removeprefix("http://").split(":")
    return f"{host}:{write}/{node.urls['read'].rsplit(':', 1)[1]}"


class Scripts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        broker = cls.enterClassContext(Broker(directory / "nats", "default"))
        cls.nodes = []
        for n in range(3):
            home = directory / str(n)
            home.mkdir()
            flags = ("--nats-url", broker.url, "--data-dir", home)
            cls.nodes.append(cls.enterClassContext(Node(home, *flags)))

    def run_script(self, script, nodes, **env):
        nodes = ",".join(map(address, nodes))
        return k6(script, **LIGHT | {"NODES": nodes, "GRADESTORE_PASSWORD": PASSWORD} | env)

    def assert_passes(self, script, nodes, **env):
        run = self.run_script(script, nodes, **env)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        for line in ALL_CHECKS_MET:
            self.assertIn(line, run.stdout)
        self.assertNotIn("MISSED", run.stdout)
        return run.stdout

    def test_smoke_passes_on_one_node(self):
        self.assert_passes("smoke.js", self.nodes[:1])

    def test_smoke_passes_on_a_cluster(self):
        self.assert_passes("smoke.js", self.nodes)

    def test_read_heavy_passes_and_writes_its_report(self):
        with tempfile.TemporaryDirectory() as directory:
            report = f"{directory}/report.txt"
            output = self.assert_passes("read-heavy.js", self.nodes, REPORT=report, IDS="uuid", ZIPF="0")
            self.assertEqual(Path(report).read_text(), output)

    def test_write_heavy_passes(self):
        self.assert_passes("write-heavy.js", self.nodes, IDS="numeric")

    def test_spike_passes(self):
        self.assert_passes("spike.js", self.nodes)

    def test_soak_passes_and_fetches_backups(self):
        self.assertIn("route:/backup", self.assert_passes("soak.js", self.nodes))

    def test_backup_passes_and_fetches_backups(self):
        self.assertIn("route:/backup", self.assert_passes("backup.js", self.nodes))

    def test_a_wrong_password_stops_the_script(self):
        run = self.run_script("read-heavy.js", self.nodes, GRADESTORE_PASSWORD="wrong")
        self.assertNotEqual(run.returncode, 0)
        self.assertIn("/set answered 401", run.stderr)

    def test_a_missed_threshold_fails_the_script(self):
        run = self.run_script("write-heavy.js", self.nodes, P99_MS="0.0001")
        self.assertNotEqual(run.returncode, 0)
        self.assertIn("MISSED  http_req_duration{route:/set}: p(99)<0.0001", run.stdout)

    def test_an_invalid_address_is_named(self):
        run = k6("smoke.js", NODES="nowhere", GRADESTORE_PASSWORD=PASSWORD)
        self.assertNotEqual(run.returncode, 0)
        self.assertIn('NODES: \\"nowhere\\" is no HOST:PORT', run.stderr)


class Generator(unittest.TestCase):
    def test_k6_generates_the_same_ids(self):
        users = (0, 1, 7, 1007, 123_456, 40_000_000)
        expected = {kind: {user: id_of(user) for user in users} for kind, id_of in generate.IDS.items()}
        run = k6("twins.js", EXPECTED=json.dumps(expected))
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

    def test_ids_are_unique(self):
        for kind, id_of in generate.IDS.items():
            self.assertEqual(len(set(map(id_of, range(200_000)))), 200_000, kind)

    def test_zipf_draws_have_the_expected_frequencies(self):
        drawn = generate.draw(100_000, 1000, 1.0)
        # The share of the first rank is 1 / (1 + 1/2 + ... + 1/1000).
        self.assertAlmostEqual(drawn.count(0) / 100_000, 1 / 7.485, delta=0.005)
        self.assertEqual(drawn, generate.draw(100_000, 1000, 1.0))
        self.assertAlmostEqual(generate.draw(100_000, 10, 0).count(0) / 100_000, 0.1, delta=0.005)

    def test_a_node_restores_the_generated_records(self):
        for kind in generate.IDS:
            with self.subTest(kind), contextlib.ExitStack() as stack:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                generate.write(directory / "grades.csv.gz", 2000, generate.IDS[kind])
                node = stack.enter_context(Node(directory, "--ephemeral", "--restore-from", directory / "grades.csv.gz"))
                self.assertEqual(node.status()["records"], 2000)
                run = k6("read-heavy.js", **LIGHT | {"NODES": address(node), "GRADESTORE_PASSWORD": PASSWORD, "IDS": kind,
                                                     "USERS": "2000", "ZIPF": "0", "SEED": "0"})
                self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
                self.assertEqual(node.status()["records"], 2000)


if __name__ == "__main__":
    unittest.main()
