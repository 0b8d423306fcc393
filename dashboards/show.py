#!/usr/bin/env python3
"""What the panels show, as text, where there is no Grafana: a Prometheus of its own on the replicas of `make cluster`, and
every panel's newest values, again every ten seconds until Ctrl-C. `make dashboards` installs Prometheus and runs it.

    python3 dashboards/show.py
    python3 dashboards/show.py overview --targets 127.0.0.1:8082
"""

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "load"))

from measure import end_with_parent, free_port  # noqa: E402

DASHBOARDS = ROOT / "dashboards"
FILES = sorted((DASHBOARDS / "grafana").glob("*.json"))
RULES = DASHBOARDS / "rules.yml"
CLUSTER = "127.0.0.1:18082,127.0.0.1:28082,127.0.0.1:38082"
# Grafana's is four scrape intervals at least.
RATE_INTERVAL, RATE_INTERVAL_S = "8s", 8
EVERY_S = 10
WAIT_S_MAX = 60
UNITS = {"short": "", "bytes": " B", "percentunit": " of 1", "Bps": " B/s", "reqps": "/s", "ops": "/s", "wps": "/s", "rps": "/s",
         "cps": "/s", "cpm": "/min", "s": " s"}


def until(wanted):
    """Asks until there is an answer, or none in time: then what was said last is the reason."""
    deadline = time.monotonic() + WAIT_S_MAX
    while True:
        missing = wanted()
        if not missing:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"after {WAIT_S_MAX} s: {missing}")
        time.sleep(0.2)


class Prometheus:
    """A real one, that scrapes these ops ports every second."""

    def __init__(self, directory, targets, rules=RULES):
        self.url = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "gradestore", "static_configs": [{"targets": targets}]}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))
        self.command = [ROOT / ".tools" / "prometheus" / "prometheus", f"--config.file={directory}/prometheus.yml",
                        f"--storage.tsdb.path={directory}/tsdb",
                        f"--web.listen-address={self.url.removeprefix('http://')}"]

    def __enter__(self):
        self.child = subprocess.Popen(self.command, stderr=subprocess.DEVNULL, preexec_fn=end_with_parent)
        until(self.not_ready)
        return self

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait()

    def not_ready(self):
        try:
            urllib.request.urlopen(f"{self.url}/-/ready").close()
        except OSError as error:
            return error

    def api(self, path, **query):
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            return json.load(urllib.request.urlopen(url))["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def ask(self, query):
        """What a query gives, series by series, numbers alone."""
        found = [(series["metric"], float(series["value"][1])) for series in self.api("query", query=query)["result"]]
        return [(labels, value) for labels, value in found if math.isfinite(value)]


def panels():
    """Every panel that has queries: its dashboard, and it."""
    for file in FILES:
        for panel in json.loads(file.read_text())["panels"]:
            if "targets" in panel:
                yield file.stem, panel


def asked(target):
    """A panel's query with Grafana's variables filled in."""
    query = target["expr"].replace("$job", "gradestore").replace("$instance", ".+")
    return query.replace("$__rate_interval", RATE_INTERVAL)


def shown(prometheus, wanted):
    """The panels of these dashboards and the alerts, a line a series."""
    last = None
    for dashboard, panel in panels():
        if dashboard not in wanted:
            continue
        if dashboard != last:
            yield f"\n== gradestore: {dashboard} =="
            last = dashboard
        unit = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
        yield panel["title"]
        for target in panel["targets"]:
            for labels, value in prometheus.ask(asked(target)):
                legend = re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), target["legendFormat"])
                yield f"    {legend:<40} {value:.6g}{unit}"
    yield "\n== alerts =="
    for alert in prometheus.api("alerts")["alerts"]:
        yield f"    {alert['labels']['alertname']:<40} {alert['state']}: {alert['annotations']['summary']}"


def main():
    names = [file.stem for file in FILES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dashboards", nargs="*", metavar="DASHBOARD", help=f"of {', '.join(names)}; nothing for all")
    parser.add_argument("--targets", default=CLUSTER, help="ops ports, with a comma between two; those of make cluster")
    args = parser.parse_args()
    if unknown := set(args.dashboards) - set(names):
        parser.error(f"{', '.join(unknown)}: give some of {', '.join(names)}")
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(KeyboardInterrupt):
        with Prometheus(Path(directory), args.targets.split(",")) as prometheus:
            print(f"Prometheus is at {prometheus.url}; the first rates take {RATE_INTERVAL_S} s. Ctrl-C ends both.", flush=True)
            time.sleep(RATE_INTERVAL_S)
            while True:
                print("\n".join(shown(prometheus, args.dashboards or names)), flush=True)
                time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
