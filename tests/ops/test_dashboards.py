"""Dashboards and alert rules, on a real Prometheus that scrapes a real cluster of three under load: every query of every
panel gives data, and no rule an error. promtool shows each alert firing and silent."""

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
from show import FILES, RULES, Prometheus, asked, panels, shown, until  # noqa: E402

PROMTOOL = ROOT / ".tools" / "prometheus" / "promtool"
K6 = ROOT / ".tools" / "bin" / "k6"
# What the machine that runs this may be short of, whatever the nodes do.
OF_THE_MACHINE = {"GradestoreDisk", "GradestoreMemory"}
METRIC = re.compile(r"\b(?:gradestore|process)_\w+")


def queries():
    """Every query of every panel: dashboard, panel, legend, query with Grafana's variables filled in."""
    for dashboard, panel in panels():
        for target in panel["targets"]:
            yield dashboard, panel["title"], target["legendFormat"], asked(target)


def post(node, **patch):
    """The status of a write."""
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
            # Often, so that there are some.
            flags = ("--nats-url", cls.broker.url, "--data-dir", home, "--snapshot-interval=1s",
                     "--checkpoint-interval=1s")
            cls.nodes.append(cls.enterClassContext(Node(home, *flags)))
            # The next one has something to restore.
            assert post(cls.nodes[n], user_id=f"user-{n}", spp=5) == 204
        cls.prometheus = cls.enterClassContext(Prometheus(cls.directory, cls.instances()))

    @classmethod
    def instances(cls):
        return [node.urls["ops"].removeprefix("http://") for node in cls.nodes]

    def load(self):
        """Backups, reads and writes on all three, for longer than this test takes."""
        addresses = (re.findall(r"\d+$", node.urls[port])[0] for node in self.nodes for port in ("write", "read"))
        nodes = ",".join(f"127.0.0.1:{write}/{read}" for write, read in zip(addresses, addresses))
        env = dict(os.environ, NODES=nodes, GRADESTORE_PASSWORD=PASSWORD, RATE="100", USERS="500", DURATION="10m", VUS="16")
        child = subprocess.Popen([K6, "run", "--quiet", "--no-usage-report", ROOT / "load" / "k6" / "backup.js"], env=env,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=end_with_parent)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)

    def test_every_query_gives_data(self):
        self.load()
        instances = set(self.instances())

        def without_data():
            for dashboard, panel, legend, query in queries():
                found = self.prometheus.ask(query)
                if "{{instance}}" in legend:
                    # From each of the three.
                    if {labels.get("instance") for labels, _ in found} != instances:
                        yield dashboard, panel, query, found
                elif not found:
                    yield dashboard, panel, query

        # A user that nobody set, for a panel of what is refused.
        for node in self.nodes:
            with self.assertRaisesRegex(urllib.error.HTTPError, "404"):
                urllib.request.urlopen(f"{node.urls['read']}/get?user_id=nobody")
        until(lambda: list(without_data()))
        self.assertEqual({value for _, value in self.prometheus.ask("gradestore_restore_rows")}, {0, 1, 2})

        rules = [rule for group in self.prometheus.api("rules")["groups"] for rule in group["rules"]]
        self.assertEqual([rule["name"] for rule in rules], [rule["alert"] for rule in written_rules()])
        until(lambda: [rule for group in self.prometheus.api("rules")["groups"] for rule in group["rules"]
                       if rule["health"] != "ok"])
        alerts = {alert["labels"]["alertname"] for alert in self.prometheus.api("alerts")["alerts"]}
        self.assertLessEqual(alerts, OF_THE_MACHINE)

        # As text, each panel has a line for what it is and one at least for what it shows.
        said = list(shown(self.prometheus, [file.stem for file in FILES]))
        for _, panel in panels():
            at = said.index(panel["title"])
            self.assertRegex(said[at + 1], r"^    \S.* -?[\d.e+-]+( |/|$)")
        told = said[said.index("\n== alerts ==") + 1:]
        self.assertEqual([line for line in told if not any(name in line for name in OF_THE_MACHINE)], [])

        # With the broker away, writes fail, and the first alert begins to wait.
        self.broker.kill()
        failed = next(query for _, panel, _, query in queries() if panel == "Failed")

        def no_failures_seen():
            self.assertNotEqual(post(self.nodes[0], user_id="alice", spp=5), 204)
            seen = {labels["route"]: value for labels, value in self.prometheus.ask(failed)}
            alerts = {alert["labels"]["alertname"] for alert in self.prometheus.api("alerts")["alerts"]}
            if not seen.get("/set", 0) > 0 or "GradestoreNotWritable" not in alerts:
                return seen, alerts

        until(no_failures_seen)

    def test_only_metrics_that_a_node_has(self):
        exposed = set(METRIC.findall(self.nodes[0].ask("/metrics")))
        used = {metric for *_, query in queries() for metric in METRIC.findall(query)}
        used |= {metric for rule in written_rules() for metric in METRIC.findall(rule["expr"])}
        self.assertEqual(used - exposed, set())

    def test_what_a_node_has_is_shown(self):
        exposed = set(re.findall(r"^# TYPE (\S+)", self.nodes[0].ask("/metrics"), re.MULTILINE))
        shown = " ".join(query for *_, query in queries())
        self.assertEqual({metric for metric in exposed if metric not in shown}, {
            # The kernel's, which says that there is none.
            "process_virtual_memory_max_bytes",
        })


def written_rules():
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


class Files(unittest.TestCase):
    def test_dashboards_are_generated(self):
        self.assertEqual([file.stem for file in FILES], sorted(generate_dashboards.DASHBOARDS))
        for file in FILES:
            self.assertEqual(file.read_text(), generate_dashboards.written(file.stem),
                             f"{file}: run python3 dashboards/generate_dashboards.py")

    def test_variables(self):
        for file in FILES:
            dashboard = json.loads(file.read_text())
            self.assertEqual([v["name"] for v in dashboard["templating"]["list"]], ["datasource", "job", "instance"])
            for panel in dashboard["panels"]:
                for target in panel.get("targets", []):
                    self.assertEqual(target["datasource"]["uid"], "$datasource")
                    for selectors in re.findall(r"\b(?:gradestore|process)_\w+(\{.*?\})?", target["expr"]):
                        self.assertIn('job="$job",instance=~"$instance"', selectors, target["expr"])

    def test_panels_have_a_place_of_their_own(self):
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


NAMES = {rule["alert"] for rule in written_rules()}


def alerts(lines):
    return set(re.findall(r'alertname="(\w+)"', "".join(lines)))


def seconds(duration):
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def promtool_test(rules):
    """What the tests of the rules say of these."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "rules.yml").write_text(json.dumps({"groups": [{"name": "gradestore", "rules": rules}]}))
        (Path(directory) / "rules_test.yml").write_text((DASHBOARDS / "rules_test.yml").read_text())
        return subprocess.run([PROMTOOL, "test", "rules", "rules_test.yml"], cwd=directory, capture_output=True,
                              text=True).stderr


class Rules(unittest.TestCase):
    def test_firing_and_silent(self):
        run = subprocess.run([PROMTOOL, "test", "rules", DASHBOARDS / "rules_test.yml"], capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

    def test_rules_that_fire_always_are_found(self):
        said = promtool_test([rule | {"expr": "vector(1)"} for rule in written_rules()])
        self.assertEqual(alerts(re.findall(r"exp: nil\n\s*got: (.*)", said)), NAMES)

    def test_rules_that_fire_a_minute_later_are_found(self):
        said = promtool_test([rule | {"for": f"{seconds(rule.get('for', '0s')) + 60}s"} for rule in written_rules()])
        self.assertEqual(alerts(re.findall(r"exp: (.*)\n\s*got: nil", said)), NAMES)

    def test_each_says_what_to_do(self):
        for rule in written_rules():
            self.assertIn(rule["labels"]["severity"], ("critical", "warning"))
            self.assertEqual(set(rule["annotations"]), {"summary", "runbook", "runbook_url"}, rule["alert"])

    def test_each_is_a_heading_of_the_runbook(self):
        for rule in written_rules():
            file, anchor = rule["annotations"]["runbook_url"].split("#")
            headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
            self.assertIn(rule["alert"], headings)
            self.assertEqual(anchor, rule["alert"].lower())


if __name__ == "__main__":
    unittest.main()
