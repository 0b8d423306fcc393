#!/usr/bin/env python3
"""Writes Grafana's dashboards, grafana/*.json, from the tables below.

    python3 dashboards/generate_dashboards.py

In a query, R stands for Grafana's rate interval, and every metric gets the selectors of job and instance. Where a
counter's series begins with its first event (answers by status), `or 0 * ...` draws the line before that.
"""

import json
import re
from pathlib import Path

GRAFANA = Path(__file__).resolve().parent / "grafana"
SELECTORS = 'job="$job",instance=~"$instance"'
METRIC = re.compile(r"\b((?:gradestore|process)_\w+)(?:\{(.*?)\})?")
COLUMNS = 24
HEIGHT = 8
REPLICA = "{{instance}}"


def quantiles(metric, labels="", *wanted):
    """A line for each quantile of a histogram, over all replicas."""
    return {f"p{wanted * 100:g}": f"histogram_quantile({wanted}, sum by (le) (rate({metric}_bucket{labels}[R])))"
            for wanted in wanted or (0.5, 0.99, 0.999)}


def requests(which="", by="route"):
    return f"sum by ({by}) (rate(gradestore_http_requests_total{which}[R]))"


def share(which):
    return f"(({requests(which)} or 0 * {requests()}) / {requests()} >= 0)"


# By dashboard its rows, by row its panels: title, unit, queries by legend, what it tells. Units are Grafana's.
DASHBOARDS = {
    "overview": {
        "Traffic": [
            ("Requests", "reqps", {"{{route}}": requests()}, "What is answered, by route."),
            ("Requests by replica", "reqps", {REPLICA: requests(by="instance")},
             "Reads spread over all replicas, if the clients do."),
            ("Records", "short", {REPLICA: "gradestore_records"}, "The same everywhere, but for what is on its way."),
        ],
        "Errors": [
            ("Failed", "percentunit", {"{{route}}": share('{status=~"5.."}')},
             "The share of requests that a replica could not answer. 503 before it is ready is among them."),
            ("Refused and failed", "reqps",
             {"{{status}} {{route}}": requests('{status=~"[45].."}', "route, status")},
             "401 is a wrong password, 404 an unknown user, 503 not ready or no broker, 504 an unknown outcome."),
            ("Serving", "short", {"reads, " + REPLICA: "gradestore_ready", "writes, " + REPLICA: "gradestore_log_writable"},
             "1 while reads are answered and while the log takes writes."),
        ],
        "Latency": [
            ("GET /get", "s", quantiles("gradestore_http_request_duration_seconds", '{route="/get"}'),
             "From a request's header to its answer, all replicas together. A read with a position may wait for it."),
            ("POST /set", "s", quantiles("gradestore_http_request_duration_seconds", '{route="/set"}'),
             "Until the write is in the log and applied: mostly the log's time."),
            ("p99 of POST /set by replica", "s",
             {REPLICA: "histogram_quantile(0.99, sum by (instance, le) "
                       '(rate(gradestore_http_request_duration_seconds_bucket{route="/set"}[R])))'},
             "One that is slower than the others is slow itself; if all are, it is the log."),
        ],
        "Saturation": [
            ("Writes that wait for a batch", "short", {REPLICA: "gradestore_write_queue_patches"},
             "At 8,192 one more is answered with 503."),
            ("Requests under way", "short", {REPLICA: "gradestore_http_requests_in_flight"}, "With the one of this scrape."),
            ("Connections", "short", {"{{port}}, " + REPLICA: "gradestore_http_connections"},
             "At 8,192 (ops: 256) one more takes the place of the idlest."),
            ("Connections cut", "cps", {"{{port}}, " + REPLICA: "rate(gradestore_http_connections_cut_total[R])"},
             "Closed for a deadline or to make room."),
        ],
    },
    "replication": {
        "Lag": [
            ("Age of what is not applied", "s", {REPLICA: "gradestore_log_lag_seconds"},
             "How old the last batch applied is, while the log has newer ones."),
            ("Batches behind", "short", {REPLICA: "gradestore_log_lag_batches"}, "In the log and not applied here."),
            ("Position", "short", {REPLICA: "gradestore_log_position", "log's end, " + REPLICA: "gradestore_log_end"},
             "A replica that stands while the end moves on is stuck."),
            ("Batches that the log keeps", "short", {REPLICA: "gradestore_log_end - gradestore_log_first"},
             "A replica that was away for longer begins anew from another one's backup."),
        ],
        "Batches": [
            ("Batches sent", "ops", {REPLICA: "rate(gradestore_batch_patches_count[R])"}, "One message to the log each."),
            ("Writes a batch", "short",
             {REPLICA: "rate(gradestore_batch_patches_sum[R]) / rate(gradestore_batch_patches_count[R])"},
             "More the longer the log takes: writes that wait together go together."),
            ("From sent to applied", "s", quantiles("gradestore_batch_duration_seconds"),
             "The log's part of a write, all replicas together."),
            ("Writes applied", "wps", {REPLICA: "rate(gradestore_patches_applied_total[R]) + rate(gradestore_deletions_applied_total[R])"}, "Own and others'."),
        ],
        "Gaps and divergence": [
            ("Digests that differed", "short", {REPLICA: "increase(gradestore_divergences_total[R])"},
             "0 for ever. Anything else: two replicas held different things at one position."),
            ("Digests compared", "cpm", {REPLICA: "60 * rate(gradestore_checkpoints_compared_total[R])"},
             "A minute. Without these nobody would notice."),
            ("Gaps", "short", {REPLICA: "increase(gradestore_log_gaps_total[R])"},
             "Times that the log lacked the batch after the last one applied."),
            ("Begun anew", "short", {REPLICA: "increase(gradestore_resyncs_total[R])"},
             "The log went on without this replica, or it had diverged."),
            ("Messages skipped", "short", {REPLICA: "increase(gradestore_log_poisoned_total[R])"},
             "Somebody published what is no batch. All replicas skip it alike."),
            ("Messages with a wrong signature", "short", {"checkpoints, " + REPLICA: "increase(gradestore_votes_rejected_total[R])",
                                                          "announcements, " + REPLICA: "increase(gradestore_announcements_rejected_total[R])"},
             "Ignored: not signed with the cluster's password."),
        ],
        "Broker": [
            ("Connections made anew", "short", {REPLICA: "increase(gradestore_log_reconnects_total[R])"},
             "The broker was away, or the network to it."),
            ("Reading taken up again", "short", {REPLICA: "increase(gradestore_log_resumes_total[R])"},
             "Where it had stopped; nothing is lost by it."),
            ("Sent or come again", "short", {"sent, " + REPLICA: "increase(gradestore_log_resends_total[R])",
                                             "come, " + REPLICA: "increase(gradestore_log_redeliveries_total[R])"},
             "Batches of which nothing was heard, and messages that were read before."),
            ("Other replicas", "short", {"known, " + REPLICA: "gradestore_peers", "ready, " + REPLICA: "gradestore_peers_ready"},
             "That answered when they were last asked."),
        ],
    },
    "recovery": {
        "Backup": [
            ("Running", "short", {REPLICA: "gradestore_backups_running"}, "Two at most; more wait."),
            ("Ended", "cpm", {"{{result}}, " + REPLICA: "60 * rate(gradestore_backups_total[R])"},
             "A minute. Broken: the client went away or took nothing for 75 s."),
            ("Bytes sent", "Bps", {REPLICA: "rate(gradestore_backup_bytes_total[R])"}, ""),
            ("Rows sent", "rps", {REPLICA: "rate(gradestore_backup_rows_total[R])"}, ""),
            ("Time of a whole one", "s", quantiles("gradestore_backup_duration_seconds", "", 0.5, 0.99), ""),
        ],
        "Restore": [
            ("Running", "short", {REPLICA: "gradestore_restore_running"}, "Reads and writes get 503 until it is done."),
            ("Rows", "short", {REPLICA: "gradestore_restore_rows"}, "Of the restore that runs or ran last."),
            ("Bytes", "bytes", {REPLICA: "gradestore_restore_bytes"}, "Of the restore that runs or ran last."),
            ("Time", "s", {REPLICA: "gradestore_restore_duration_seconds"}, "Of the restore that runs or ran last."),
            ("Read ahead of it", "bytes", {REPLICA: "gradestore_restore_buffered_bytes"},
             "What others write meanwhile; at 32 MiB reading waits."),
            ("Batches read ahead", "short", {REPLICA: "gradestore_restore_buffered_batches"}, ""),
        ],
        "Snapshots": [
            ("Age", "s", {REPLICA: "gradestore_snapshot_age_seconds"},
             "An idle store writes none. What came since is read from the log at a start."),
            ("Batches since", "short", {REPLICA: "gradestore_log_position - gradestore_snapshot_position"}, ""),
            ("Time", "s", {REPLICA: "gradestore_snapshot_duration_seconds"}, ""),
            ("Size", "bytes", {REPLICA: "gradestore_snapshot_bytes"}, ""),
            ("Rows", "short", {REPLICA: "gradestore_snapshot_rows"}, ""),
            ("Failed", "short", {REPLICA: "increase(gradestore_snapshot_failures_total[R])"},
             "The disk refused: full, most likely."),
        ],
    },
    "process": {
        "Process": [
            ("Version", "short", {"{{version}}, " + REPLICA: "gradestore_build_info"}, "Two lines while an update runs."),
            ("Running for", "s", {REPLICA: "time() - process_start_time_seconds"}, "Falls to 0 at a restart."),
            ("CPU", "short", {REPLICA: "rate(process_cpu_seconds_total[R])"}, "Cores."),
            ("Threads", "short", {REPLICA: "process_threads"}, ""),
        ],
        "Memory": [
            ("Resident", "bytes", {REPLICA: "process_resident_memory_bytes", "limit, " + REPLICA: "gradestore_memory_limit_bytes"},
             "Grows with the records. At the limit, of its control group or of the machine, the kernel ends the process."),
            ("In use", "bytes", {REPLICA: "gradestore_memory_used_bytes", "limit, " + REPLICA: "gradestore_memory_max_bytes"},
             "Without what deleted records left to new ones. Above the limit, --memory-max, all replicas refuse new users."),
            ("Full", "short", {REPLICA: "gradestore_store_full"}, "1 while the replica is above its limit: 507 for new users."),
            ("Resident a record", "bytes", {REPLICA: "process_resident_memory_bytes / (gradestore_records > 0)"},
             "What does not belong to records weighs in a small store."),
            ("Virtual", "bytes", {REPLICA: "process_virtual_memory_bytes"}, ""),
        ],
        "Disk": [
            ("Free where the data directory is", "bytes", {REPLICA: "gradestore_data_dir_free_bytes"},
             "A snapshot that is being written needs as much as the last one has."),
            ("Share that is free", "percentunit", {REPLICA: "gradestore_data_dir_free_bytes / gradestore_data_dir_size_bytes"},
             "Others may use the file system too."),
        ],
        "Files and connections": [
            ("Open files", "short", {REPLICA: "process_open_fds", "limit, " + REPLICA: "process_max_fds"},
             "A connection is one. A low limit lowers how many connections are taken."),
            ("Connections accepted", "cps", {"{{port}}, " + REPLICA: "rate(gradestore_http_connections_accepted_total[R])"},
             "Near the rate of requests: clients do not keep connections."),
            ("Requests by path", "reqps", {"{{path}}": "sum by (path) (rate(gradestore_http_path_total[R]))"},
             "The router takes more CPU time than the fast path."),
        ],
    },
}


def promql(query):
    """A query as Grafana is given it."""
    def select(match):
        metric, labels = match.groups()
        return f"{metric}{{{SELECTORS}{',' + labels if labels else ''}}}"
    return METRIC.sub(select, query).replace("[R]", "[$__rate_interval]")


def source():
    return {"type": "prometheus", "uid": "$datasource"}


def panel(number, at, title, unit, queries, tells):
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": tells,
        "datasource": source(),
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [{"refId": chr(ord("A") + n), "datasource": source(), "expr": promql(query), "legendFormat": legend}
                    for n, (legend, query) in enumerate(queries.items())],
    }


def variable(name, label, **more):
    return {"name": name, "label": label, "hide": 0, **more}


def from_labels(name, label, query, **more):
    return variable(name, label, type="query", datasource=source(), refresh=2, sort=1,
                    query={"query": query, "refId": name}, definition=query, **more)


def panels(rows):
    """The rows under each other, the panels of a row side by side, three or four to a line."""
    made, top = [], 0
    for title, row in rows.items():
        made.append({"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                     "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1}})
        top += 1
        side_by_side = 4 if len(row) == 4 else 3
        width = COLUMNS // side_by_side
        for n, described in enumerate(row):
            line, column = divmod(n, side_by_side)
            at = {"x": column * width, "y": top + line * HEIGHT, "w": width, "h": HEIGHT}
            made.append(panel(len(made) + 1, at, *described))
        top += -(-len(row) // side_by_side) * HEIGHT
    return made


def dashboard(name, rows):
    return {
        "uid": f"gradestore-{name}",
        "title": f"gradestore: {name}",
        "tags": ["gradestore"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "title": "gradestore", "tags": ["gradestore"], "asDropdown": False,
                   "includeVars": True, "keepTime": True}],
        "annotations": {"list": []},
        "templating": {"list": [
            variable("datasource", "Prometheus", type="datasource", query="prometheus"),
            from_labels("job", "Job", "label_values(gradestore_build_info, job)"),
            from_labels("instance", "Replica", 'label_values(gradestore_build_info{job="$job"}, instance)',
                        multi=True, includeAll=True, allValue=".+",
                        current={"text": ["All"], "value": ["$__all"]}),
        ]},
        "panels": panels(rows),
    }


def written(name):
    """The text of a dashboard's file."""
    return json.dumps(dashboard(name, DASHBOARDS[name]), indent=1, ensure_ascii=False) + "\n"


def main():
    for name in DASHBOARDS:
        (GRAFANA / f"{name}.json").write_text(written(name))


if __name__ == "__main__":
    main()
