"""Dashboards and alert rules on a real Prometheus that scrapes three nodes under load: every query of every panel returns
data, and no rule fails. promtool tests each alert firing and silent."""

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
import urllib.error
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "dashboards"
sys.path[:0] = [str(ROOT / "load"), str(DASHBOARDS)]

import generate_dashboards  # noqa: E402
from measure import AUTH, PASSWORD, Broker, Node, end_with_parent  # noqa: E402
from show import FILES, RULES, Prometheus, panels, query_of, text_lines, until  # noqa: E402

PROMTOOL = ROOT / ".tools" / "prometheus" / "promtool"
K6 = ROOT / ".tools" / "bin" / "k6"
# These depend on the machine that runs the tests.
MACHINE_ALERTS = {"GradestoreDisk", "GradestoreMemory"}
METRIC = re.compile(r"\b(?:gradestore|process)_\w+")


def queries():
    """Every query of every panel: dashboard, panel, legend, query with variables filled in."""
    for dashboard, panel in panels():
        for target in panel["targets"]:
            yield dashboard, panel["title"], target["legendFormat"], query_of(target)


def post(node, **patch):
    """Sends a write; returns the status."""
    request = urllib.request.Request(f"{node.urls['write']}/set", json.dumps(patch).encode(),
                                     {"Authorization": f"Basic {AUTH}", "Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code


class UnderLoad(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.broker = cls.enterClassContext(Broker(cls.directory / "nats", "default"))
        cls.nodes = []
        for n in range(3):
            home = cls.directory / str(n)
            home.mkdir()
            # Short intervals, so that the test sees some.
            flags = ("--nats-url", cls.broker.url, "--data-dir", home, "--snapshot-interval=1s",
                     "--checkpoint-interval=1s")
            cls.nodes.append(cls.enterClassContext(Node(home, *flags)))
            # Data for the next node to restore.
            assert post(cls.nodes[n], user_id=f"user-{n}", spp=5) == 204
        cls.prometheus = cls.enterClassContext(Prometheus(cls.directory, cls.instances()))

    @classmethod
    def instances(cls):
        return [node.urls["ops"].removeprefix("http://") for node in cls.nodes]

    def load(self):
        """Runs backups, reads and writes on all nodes until the test ends."""
        addresses = (re.findall(r"\d+$", node.urls[port])[0] for node in self.nodes for port in ("write", "read"))
        nodes = ",".join(f"127.0.0.1:{write}/{read}" for write, read in zip(addresses, addresses))
        env = dict(os.environ, NODES=nodes, GRADESTORE_PASSWORD=PASSWORD, RATE="100", USERS="500", DURATION="10m", VUS="16")
        child = subprocess.Popen([K6, "run", "--quiet", "--no-usage-report", ROOT / "load" / "k6" / "backup.js"], env=env,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=end_with_parent)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)

    def test_every_query_returns_data(self):
        self.load()
        instances = set(self.instances())

        def without_data():
            for dashboard, panel, legend, query in queries():
                found = self.prometheus.query(query)
                if "{{instance}}" in legend:
                    # One series for each node.
                    if {labels.get("instance") for labels, _ in found} != instances:
                        yield dashboard, panel, query, found
                elif not found:
                    yield dashboard, panel, query

        # An unknown user, for the panel of errors.
        for node in self.nodes:
            with self.assertRaisesRegex(urllib.error.HTTPError, "404"):
                urllib.request.urlopen(f"{node.urls['read']}/get?user_id=nobody")
        until(lambda: list(without_data()))
        self.assertEqual({value for _, value in self.prometheus.query("gradestore_restore_rows")}, {0, 1, 2})

        loaded = [rule["name"] for group in self.prometheus.api("rules")["groups"] for rule in group["rules"]]
        self.assertEqual(loaded, [rule["alert"] for rule in rules()])
        until(lambda: [rule for group in self.prometheus.api("rules")["groups"] for rule in group["rules"]
                       if rule["health"] != "ok"])
        alerts = {alert["labels"]["alertname"] for alert in self.prometheus.api("alerts")["alerts"]}
        self.assertLessEqual(alerts, MACHINE_ALERTS)

        # In the text each panel has a title and at least one value.
        lines = list(text_lines(self.prometheus, [file.stem for file in FILES]))
        for _, panel in panels():
            at = lines.index(panel["title"])
            self.assertRegex(lines[at + 1], r"^    \S.* -?[\d.e+-]+( |/|$)")
        firing = lines[lines.index("\n== alerts ==") + 1:]
        self.assertEqual([line for line in firing if not any(name in line for name in MACHINE_ALERTS)], [])

        # Without NATS writes fail, and the first alert becomes pending.
        self.broker.kill()
        failed = next(query for _, panel, _, query in queries() if panel == "Error ratio")

        def no_failures_seen():
            self.assertNotEqual(post(self.nodes[0], user_id="alice", spp=5), 204)
            seen = {labels["route"]: value for labels, value in self.prometheus.query(failed)}
            alerts = {alert["labels"]["alertname"] for alert in self.prometheus.api("alerts")["alerts"]}
            if not seen.get("/set", 0) > 0 or "GradestoreNotWritable" not in alerts:
                return seen, alerts

        until(no_failures_seen)

    def test_panels_and_rules_use_only_existing_metrics(self):
        exposed = set(METRIC.findall(self.nodes[0].ask("/metrics")))
        used = {metric for *_, query in queries() for metric in METRIC.findall(query)}
        used |= {metric for rule in rules() for metric in METRIC.findall(rule["expr"])}
        self.assertEqual(used - exposed, set())

    def test_panels_show_all_metrics(self):
        exposed = set(re.findall(r"^# TYPE (\S+)", self.nodes[0].ask("/metrics"), re.MULTILINE))
        used = " ".join(query for *_, query in queries())
        self.assertEqual({metric for metric in exposed if metric not in used}, set())


def rules():
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


class Files(unittest.TestCase):
    def test_dashboards_match_the_generator(self):
        self.assertEqual([file.stem for file in FILES], sorted(generate_dashboards.DASHBOARDS))
        for file in FILES:
            self.assertEqual(file.read_text(), generate_dashboards.dashboard_json(file.stem),
                             f"{file}: run python3 dashboards/generate_dashboards.py")

    def test_queries_use_the_variables(self):
        for file in FILES:
            dashboard = json.loads(file.read_text())
            self.assertEqual([v["name"] for v in dashboard["templating"]["list"]], ["datasource", "job", "instance"])
            for panel in dashboard["panels"]:
                for target in panel.get("targets", []):
                    self.assertEqual(target["datasource"]["uid"], "$datasource")
                    for selectors in re.findall(r"\b(?:gradestore|process)_\w+(\{.*?\})?", target["expr"]):
                        self.assertIn('job="$job",instance=~"$instance"', selectors, target["expr"])

    def test_panels_do_not_overlap(self):
        for file in FILES:
            taken, numbers = set(), []
            for panel in json.loads(file.read_text())["panels"]:
                at = panel["gridPos"]
                cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
                self.assertFalse(cells & taken, panel["title"])
                self.assertLessEqual(at["x"] + at["w"], 24)
                taken |= cells
                numbers.append(panel["id"])
            self.assertEqual(len(numbers), len(set(numbers)))


NAMES = {rule["alert"] for rule in rules()}


def alerts(lines):
    return set(re.findall(r'alertname="(\w+)"', "".join(lines)))


def seconds(duration):
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def promtool_test(changed_rules):
    """The output of the rule tests with other rules."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "rules.yml").write_text(json.dumps({"groups": [{"name": "gradestore", "rules": changed_rules}]}))
        (Path(directory) / "rules_test.yml").write_text((DASHBOARDS / "rules_test.yml").read_text())
        return subprocess.run([PROMTOOL, "test", "rules", "rules_test.yml"], cwd=directory, capture_output=True,
                              text=True).stderr


class Rules(unittest.TestCase):
    def test_each_alert_fires_and_is_silent(self):
        run = subprocess.run([PROMTOOL, "test", "rules", DASHBOARDS / "rules_test.yml"], capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

    def test_rules_that_always_fire_are_detected(self):
        output = promtool_test([rule | {"expr": "vector(1)"} for rule in rules()])
        self.assertEqual(alerts(re.findall(r"exp: nil\n\s*got: (.*)", output)), NAMES)

    def test_rules_that_fire_a_minute_late_are_detected(self):
        output = promtool_test([rule | {"for": f"{seconds(rule.get('for', '0s')) + 60}s"} for rule in rules()])
        self.assertEqual(alerts(re.findall(r"exp: (.*)\n\s*got: nil", output)), NAMES)

    def test_each_alert_has_a_runbook(self):
        for rule in rules():
            self.assertIn(rule["labels"]["severity"], ("critical", "warning"))
            self.assertEqual(set(rule["annotations"]), {"summary", "runbook", "runbook_url"}, rule["alert"])

    def test_each_alert_is_a_heading_of_the_runbook(self):
        for rule in rules():
            file, anchor = rule["annotations"]["runbook_url"].split("#")
            headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
            self.assertIn(rule["alert"], headings)
            self.assertEqual(anchor, rule["alert"].lower())


if __name__ == "__main__":
    unittest.main()
