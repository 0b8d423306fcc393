"""Samples the resources of processes while they run, and checks them for growth."""

import os
import re
import statistics
import threading
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

EVERY_S = 5
ASK_S_MAX = 2
# A new process still fills its caches.
SETTLED_AFTER_S = 60
SAMPLES_MIN = 5
DRAWN_A_MINUTE = 4
MIB = 1024 * 1024
WHAT = {"RSS, MiB": "rss_mib", "file descriptors": "files", "threads": "threads", "disk, MiB": "disk_mib"}
# The storage of a stream depends on the number of batches in its retention time; on a slow machine they are fewer
# and larger. The storage per write must not grow. The headers of a batch count as three writes.
BROKERS = {"RSS, MiB": None, "file descriptors": "files", "threads": "threads", "disk, MiB": None,
           "disk, bytes/write": "write_bytes"}
WRITES_A_HEADER = 3
METRICS = {"connections": r"gradestore_http_connections\{.*\}", "requests": "gradestore_http_requests_in_flight",
           "queued": "gradestore_write_queue_requests", "buffered": "gradestore_restore_buffered_batches",
           "backups": "gradestore_backups_running"}
LOG = {"first": "gradestore_log_first", "end": "gradestore_log_end", "patches": "gradestore_patches_applied_total"}


def thinned(points, combine):
    """One point for each part of a minute."""
    parts = defaultdict(list)
    for at, value in points:
        parts[int(at * DRAWN_A_MINUTE)].append(value)
    return [((part + 0.5) / DRAWN_A_MINUTE, combine(values)) for part, values in sorted(parts.items())]


def disk_mib(directory):
    """The size of its files, without those that are removed meanwhile."""
    used_bytes = 0
    for path in directory.rglob("*"):
        try:
            used_bytes += path.stat().st_blocks * 512 if path.is_file() else 0
        except OSError:
            pass
    return used_bytes / MIB


def metrics(node):
    with urllib.request.urlopen(node.urls["ops"] + "/metrics", timeout=ASK_S_MAX) as answer:
        text = answer.read().decode()
    lines = METRICS | LOG
    return {name: sum(map(float, re.findall(rf"^{line} (\S+)$", text, re.MULTILINE))) for name, line in lines.items()}


def sample(process, directory):
    of = Path(f"/proc/{process.pid}")
    status = (of / "status").read_text()
    return {"pid": process.pid, "rss_mib": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,
            "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]), "files": len(list((of / "fd").iterdir())),
            "disk_mib": disk_mib(directory)}


class Watch(threading.Thread):
    """Samples each process every few seconds. `processes` are {name: (process, directory)}."""

    def __init__(self, processes, began):
        super().__init__(daemon=True)
        self.processes, self.began = processes, began
        self.samples = {name: [] for name in processes}
        self.node_metrics = {name: [] for name in processes}
        self.first_seen = {}
        self.load_averages = []
        self.stopped = threading.Event()

    def run(self):
        due = time.monotonic()
        while not self.stopped.wait(max(0, due - time.monotonic())):
            due = max(due + EVERY_S, time.monotonic())
            self.load_averages.append((time.monotonic() - self.began, os.getloadavg()[0]))
            for name, (process, directory) in self.processes.items():
                now = time.monotonic() - self.began
                try:
                    found = sample(process, directory)
                except (OSError, TypeError):
                    continue  # It has just been ended.
                found["age_s"] = now - self.first_seen.setdefault(found["pid"], now)
                self.samples[name].append((now, found))
                if not hasattr(process, "urls"):
                    held = self.writes_held()
                    found["write_bytes"] = found["disk_mib"] * MIB / held if held else None
                    continue
                try:
                    self.node_metrics[name].append((now, metrics(process)))
                except OSError:
                    pass  # It is stopped, or does not listen yet.

    def writes_held(self):
        """The number of writes in the log, with headers counted, by the node that was never stopped; `None` before
        the first trim."""
        samples = [sample for _, sample in next(iter(self.node_metrics.values()))]
        first, end = (samples[-1]["first"], samples[-1]["end"]) if samples else (0, 0)
        if not samples or not samples[0]["end"] < first <= end:
            return None
        then = next(each for each in samples if each["end"] >= first)
        return samples[-1]["patches"] - then["patches"] + WRITES_A_HEADER * (end - first + 1)

    def stop(self):
        self.stopped.set()
        self.join()

    def lives(self, name):
        """The number of processes, and the longest observation in seconds."""
        ages = defaultdict(float)
        for _, found in self.samples[name]:
            ages[found["pid"]] = max(ages[found["pid"]], found["age_s"])
        return len(ages), max(ages.values())

    def lines(self, names, key, most=float("inf")):
        """The chart's lines, in minutes: the maximum of each few samples."""
        return {name: thinned([(at / 60, min(found[key], most)) for at, found in self.samples[name]], max)
                for name in names}

    def settled(self, name, key, begin, end):
        """The median in a part of the time, excluding the first minute of each process; `None` with too few
        samples."""
        values = [found[key] for at, found in self.samples[name]
                  if begin <= at < end and found["age_s"] >= SETTLED_AFTER_S and found[key] is not None]
        return statistics.median(values) if len(values) >= SAMPLES_MIN else None

    def median_and_max(self, name, key, begin, end):
        """Median and maximum of a node's metric."""
        values = [found[key] for at, found in self.node_metrics[name] if begin <= at < end]
        return (statistics.median(values), max(values)) if values else (0, 0)
