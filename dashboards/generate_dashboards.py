#!/usr/bin/env python3
"""Writes Grafana's dashboards, grafana/*.json, from the tables below.

    python3 dashboards/generate_dashboards.py

In a query, R stands for Grafana's rate interval, and every metric gets the selectors of job and instance. A counter by
status has no series before its first event; `or 0 * ...` draws zeros until then.
"""

import json
import re
from pathlib import Path

GRAFANA = Path(__file__).resolve().parent / "grafana"
SELECTORS = 'job="$job",instance=~"$instance"'
METRIC = re.compile(r"\b((?:gradestore|process)_\w+)(?:\{(.*?)\})?")
COLUMNS = 24
HEIGHT = 8
NODE = "{{instance}}"


def quantiles(metric, labels="", *wanted):
    """A query for each quantile of a histogram, over all nodes."""
    return {f"p{wanted * 100:g}": f"histogram_quantile({wanted}, sum by (le) (rate({metric}_bucket{labels}[R])))"
            for wanted in wanted or (0.5, 0.99, 0.999)}


def requests(which="", by="route"):
    return f"sum by ({by}) (rate(gradestore_http_requests_total{which}[R]))"


def share(which):
    return f"(({requests(which)} or 0 * {requests()}) / {requests()} >= 0)"


# Dashboards, their rows, and the panels of each: title, unit, queries by legend, description. Units are Grafana's.
DASHBOARDS = {
    "overview": {
        "Traffic": [
            ("Requests", "reqps", {"{{route}}": requests()}, "Requests with a response, by route."),
            ("Requests by node", "reqps", {NODE: requests(by="instance")},
             "Even if the clients distribute their requests evenly."),
            ("Records", "short", {NODE: "gradestore_records"}, "The same on all nodes, except for writes in flight."),
        ],
        "Errors": [
            ("Error ratio", "percentunit", {"{{route}}": share('{status=~"5.."}')},
             "The share of requests with a 5xx status, including 503 before a node is ready."),
            ("Errors by status", "reqps",
             {"{{status}} {{route}}": requests('{status=~"[45].."}', "route, status")},
             "401: wrong password. 404: unknown user. 503: not ready, or NATS is unreachable. 504: write status unknown."),
            ("Serving", "short", {"reads, " + NODE: "gradestore_ready", "writes, " + NODE: "gradestore_log_writable"},
             "1 while the node serves reads, and while the log accepts writes."),
        ],
        "Latency": [
            ("GET /get", "s", quantiles("gradestore_http_request_duration_seconds", '{route="/get"}'),
             "From a request's header to its response, all nodes together. A read with Grade-Position may wait."),
            ("POST /set", "s", quantiles("gradestore_http_request_duration_seconds", '{route="/set"}'),
             "Until the write is in the log and applied. Mostly the latency of the log."),
            ("p99 of POST /set by node", "s",
             {NODE: "histogram_quantile(0.99, sum by (instance, le) "
                       '(rate(gradestore_http_request_duration_seconds_bucket{route="/set"}[R])))'},
             "If one node is slower than the others, it is overloaded. If all are, the log is slow."),
        ],
        "Saturation": [
            ("Queued writes", "short", {NODE: "gradestore_write_queue_requests"},
             "Waiting for a batch. At 8,192 further writes are rejected with 503."),
            ("Requests in flight", "short", {NODE: "gradestore_http_requests_in_flight"}, "Including Prometheus' own."),
            ("Connections", "short", {"{{port}}, " + NODE: "gradestore_http_connections"},
             "At 8,192 (ops: 256) a new connection evicts the one that is idle longest."),
            ("Connections closed by the node", "cps", {"{{port}}, " + NODE: "rate(gradestore_http_connections_cut_total[R])"},
             "After a timeout, or evicted at the limit."),
        ],
    },
    "replication": {
        "Lag": [
            ("Lag", "s", {NODE: "gradestore_log_lag_seconds"},
             "The age of the last applied batch while the log has newer ones."),
            ("Lag in batches", "short", {NODE: "gradestore_log_lag_batches"}, "In the log and not applied by the node."),
            ("Position", "short", {NODE: "gradestore_log_position", "end of the log, " + NODE: "gradestore_log_end"},
             "A node whose position stays while the end grows is stuck."),
            ("Batches in the log", "short", {NODE: "gradestore_log_end - gradestore_log_first"},
             "A node that was down for more batches bootstraps from another node's backup."),
        ],
        "Batches": [
            ("Batches sent", "ops", {NODE: "rate(gradestore_batch_writes_count[R])"}, "Each is one message in the log."),
            ("Writes per batch", "short",
             {NODE: "rate(gradestore_batch_writes_sum[R]) / rate(gradestore_batch_writes_count[R])"},
             "Group commit: grows with the latency of the log and the number of concurrent writes."),
            ("Batch latency", "s", quantiles("gradestore_batch_duration_seconds"),
             "From sent to applied, all nodes together: the log's part of a write."),
            ("Writes applied", "wps", {NODE: "rate(gradestore_patches_applied_total[R]) + rate(gradestore_deletions_applied_total[R])"},
             "Sent by this node and by others."),
        ],
        "Gaps and divergence": [
            ("Digest mismatches", "short", {NODE: "increase(gradestore_divergences_total[R])"},
             "Should always be 0. Otherwise two nodes held different grades at one position."),
            ("Digests compared", "cpm", {NODE: "60 * rate(gradestore_checkpoints_compared_total[R])"},
             "Per minute. Without comparisons a mismatch goes unnoticed."),
            ("Gaps", "short", {NODE: "increase(gradestore_log_gaps_total[R])"},
             "The log did not have the batch after the last applied one."),
            ("Bootstrapped again", "short", {NODE: "increase(gradestore_resyncs_total[R])"},
             "The log was trimmed beyond the node's position, or the node had diverged."),
            ("Messages skipped", "short", {NODE: "increase(gradestore_log_poisoned_total[R])"},
             "A client published messages that are not batches. All nodes skip the same ones."),
            ("Rejected signatures", "short", {"checkpoints, " + NODE: "increase(gradestore_votes_rejected_total[R])",
                                                          "announcements, " + NODE: "increase(gradestore_announcements_rejected_total[R])"},
             "Ignored messages that are not signed with the cluster's password."),
        ],
        "NATS": [
            ("Reconnects", "short", {NODE: "increase(gradestore_log_reconnects_total[R])"},
             "NATS or the network to it was down."),
            ("Resumed subscriptions", "short", {NODE: "increase(gradestore_log_resumes_total[R])"},
             "Continued at the same position; no batch is lost."),
            ("Resends and redeliveries", "short", {"sent, " + NODE: "increase(gradestore_log_resends_total[R])",
                                                   "delivered, " + NODE: "increase(gradestore_log_redeliveries_total[R])"},
             "Batches sent again without an acknowledgement, and messages delivered again."),
            ("Other nodes", "short", {"known, " + NODE: "gradestore_peers", "ready, " + NODE: "gradestore_peers_ready"},
             "That responded to the last query."),
        ],
    },
    "recovery": {
        "Backup": [
            ("Running", "short", {NODE: "gradestore_backups_running"}, "At most two; further requests wait."),
            ("Finished", "cpm", {"{{result}}, " + NODE: "60 * rate(gradestore_backups_total[R])"},
             "Per minute. broken: the client disconnected or read nothing for 75 s."),
            ("Bytes sent", "Bps", {NODE: "rate(gradestore_backup_bytes_total[R])"}, ""),
            ("Rows sent", "rps", {NODE: "rate(gradestore_backup_rows_total[R])"}, ""),
            ("Duration", "s", quantiles("gradestore_backup_duration_seconds", "", 0.5, 0.99), ""),
        ],
        "Restore": [
            ("Running", "short", {NODE: "gradestore_restore_running"}, "Reads and writes are rejected with 503 until it is done."),
            ("Rows", "short", {NODE: "gradestore_restore_rows"}, "Of the current or last restore."),
            ("Bytes", "bytes", {NODE: "gradestore_restore_bytes"}, "Of the current or last restore."),
            ("Duration", "s", {NODE: "gradestore_restore_duration_seconds"}, "Of the current or last restore."),
            ("Buffered bytes", "bytes", {NODE: "gradestore_restore_buffered_bytes"},
             "Batches read from the log during the restore. At 32 MiB reading pauses."),
            ("Buffered batches", "short", {NODE: "gradestore_restore_buffered_batches"}, ""),
        ],
        "Snapshots": [
            ("Age", "s", {NODE: "gradestore_snapshot_age_seconds"},
             "An idle node writes none. A start reads the batches since then from the log."),
            ("Batches since", "short", {NODE: "gradestore_log_position - gradestore_snapshot_position"}, ""),
            ("Duration", "s", {NODE: "gradestore_snapshot_duration_seconds"}, ""),
            ("Size", "bytes", {NODE: "gradestore_snapshot_bytes"}, ""),
            ("Rows", "short", {NODE: "gradestore_snapshot_rows"}, ""),
            ("Failed", "short", {NODE: "increase(gradestore_snapshot_failures_total[R])"},
             "Most likely the disk is full."),
        ],
        "Copy of the log": [
            ("Batches", "short", {NODE: "gradestore_wal_last - gradestore_wal_first + 1"},
             "In the newest run. Fewer after a batch that could not be written."),
            ("Size", "bytes", {NODE: "gradestore_wal_bytes"}, ""),
            ("Failing", "short", {NODE: "gradestore_wal_failing"},
             "Most likely the disk is full. With --wal-sync always the node then rejects writes."),
            ("Failed writes", "short", {NODE: "increase(gradestore_wal_failures_total[R])"}, ""),
        ],
    },
    "process": {
        "Process": [
            ("Version", "short", {"{{version}}, " + NODE: "gradestore_build_info"}, "Two versions during an upgrade."),
            ("Uptime", "s", {NODE: "time() - process_start_time_seconds"}, "0 after a restart."),
            ("CPU", "short", {NODE: "rate(process_cpu_seconds_total[R])"}, "Cores."),
            ("Threads", "short", {NODE: "process_threads"}, ""),
        ],
        "Memory": [
            ("Resident", "bytes", {NODE: "process_resident_memory_bytes", "limit, " + NODE: "gradestore_memory_limit_bytes"},
             "Grows with the records. At the limit of the control group or the machine the kernel kills the process."),
            ("In use", "bytes", {NODE: "gradestore_memory_used_bytes", "limit, " + NODE: "gradestore_memory_max_bytes"},
             "Without memory that deleted records left for new ones. Above --memory-max all nodes reject new users."),
            ("Full", "short", {NODE: "gradestore_store_full"}, "1 while the node is above --memory-max: new users are rejected with 507."),
            ("Resident per record", "bytes", {NODE: "process_resident_memory_bytes / (gradestore_records > 0)"},
             "Includes memory that does not belong to records, which dominates in a small store."),
            ("Virtual", "bytes", {NODE: "process_virtual_memory_bytes"}, ""),
        ],
        "Disk": [
            ("Free space", "bytes", {NODE: "gradestore_data_dir_free_bytes"},
             "On the file system of the data directory. A new snapshot needs as much as the last one."),
            ("Free share", "percentunit", {NODE: "gradestore_data_dir_free_bytes / gradestore_data_dir_size_bytes"},
             "Other programs may use the file system too."),
        ],
        "Files and connections": [
            ("Open files", "short", {NODE: "process_open_fds", "limit, " + NODE: "process_max_fds"},
             "Each connection is one. A low limit also limits the connections."),
            ("Connections accepted", "cps", {"{{port}}, " + NODE: "rate(gradestore_http_connections_accepted_total[R])"},
             "Near the request rate if clients do not reuse connections."),
            ("Requests by path", "reqps", {"{{path}}": "sum by (path) (rate(gradestore_http_path_total[R]))"},
             "The router takes more CPU time than the fast path."),
        ],
    },
}


def promql(query):
    """A query with selectors and the rate interval."""
    def select(match):
        metric, labels = match.groups()
        return f"{metric}{{{SELECTORS}{',' + labels if labels else ''}}}"
    return METRIC.sub(select, query).replace("[R]", "[$__rate_interval]")


def source():
    return {"type": "prometheus", "uid": "$datasource"}


def panel(number, at, title, unit, queries, description):
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": description,
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
    """The rows below each other, with three or four panels in a line."""
    made, top = [], 0
    for title, row in rows.items():
        made.append({"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                     "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1}})
        top += 1
        side_by_side = 4 if len(row) == 4 else 3
        width = COLUMNS // side_by_side
        for n, definition in enumerate(row):
            line, column = divmod(n, side_by_side)
            at = {"x": column * width, "y": top + line * HEIGHT, "w": width, "h": HEIGHT}
            made.append(panel(len(made) + 1, at, *definition))
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
            from_labels("instance", "Node", 'label_values(gradestore_build_info{job="$job"}, instance)',
                        multi=True, includeAll=True, allValue=".+",
                        current={"text": ["All"], "value": ["$__all"]}),
        ]},
        "panels": panels(rows),
    }


def dashboard_json(name):
    """The content of a dashboard's file."""
    return json.dumps(dashboard(name, DASHBOARDS[name]), indent=1, ensure_ascii=False) + "\n"


def main():
    for name in DASHBOARDS:
        (GRAFANA / f"{name}.json").write_text(dashboard_json(name))


if __name__ == "__main__":
    main()
