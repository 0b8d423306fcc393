#!/usr/bin/env python3
"""Prints the values of all panels as text, without Grafana: starts a Prometheus that scrapes the nodes of `make cluster`,
and prints the newest values every ten seconds until Ctrl-C. `make dashboards` installs Prometheus and runs it.

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
# Grafana uses at least four scrape intervals.
RATE_INTERVAL, RATE_INTERVAL_S = "8s", 8
EVERY_S = 10
WAIT_S_MAX = 60
UNITS = {"short": "", "bytes": " B", "percentunit": " of 1", "Bps": " B/s", "reqps": "/s", "ops": "/s", "wps": "/s", "rps": "/s",
         "cps": "/s", "cpm": "/min", "s": " s"}


def until(failing):
    """Waits until `failing` returns nothing. After a timeout its last result is the error."""
    deadline = time.monotonic() + WAIT_S_MAX
    while True:
        reason = failing()
        if not reason:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"after {WAIT_S_MAX} s: {reason}")
        time.sleep(0.2)


class Prometheus:
    """A Prometheus that scrapes these ops ports every second."""

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

    def query(self, query):
        """The finite values of a query, by labels."""
        found = [(series["metric"], float(series["value"][1])) for series in self.api("query", query=query)["result"]]
        return [(labels, value) for labels, value in found if math.isfinite(value)]


def panels():
    """The panels with queries, each with the name of its dashboard."""
    for file in FILES:
        for panel in json.loads(file.read_text())["panels"]:
            if "targets" in panel:
                yield file.stem, panel


def query_of(target):
    """A panel's query with Grafana's variables filled in."""
    query = target["expr"].replace("$job", "gradestore").replace("$instance", ".+")
    return query.replace("$__rate_interval", RATE_INTERVAL)


def text_lines(prometheus, dashboards):
    """The panels of these dashboards with a line for each series, and the alerts."""
    last = None
    for dashboard, panel in panels():
        if dashboard not in dashboards:
            continue
        if dashboard != last:
            yield f"\n== gradestore: {dashboard} =="
            last = dashboard
        unit = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
        yield panel["title"]
        for target in panel["targets"]:
            for labels, value in prometheus.query(query_of(target)):
                legend = re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), target["legendFormat"])
                yield f"    {legend:<40} {value:.6g}{unit}"
    yield "\n== alerts =="
    for alert in prometheus.api("alerts")["alerts"]:
        yield f"    {alert['labels']['alertname']:<40} {alert['state']}: {alert['annotations']['summary']}"


def main():
    names = [file.stem for file in FILES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dashboards", nargs="*", metavar="DASHBOARD", help=f"{', '.join(names)}; default: all")
    parser.add_argument("--targets", default=CLUSTER, help="ops ports, separated by commas; default: those of make cluster")
    args = parser.parse_args()
    if unknown := set(args.dashboards) - set(names):
        parser.error(f"unknown dashboard {', '.join(unknown)}: use {', '.join(names)}")
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(KeyboardInterrupt):
        with Prometheus(Path(directory), args.targets.split(",")) as prometheus:
            print(f"Prometheus listens on {prometheus.url}; the first rates take {RATE_INTERVAL_S} s. Ctrl-C stops it.", flush=True)
            time.sleep(RATE_INTERVAL_S)
            while True:
                print("\n".join(text_lines(prometheus, args.dashboards or names)), flush=True)
                time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
