//! What the metrics' HELP lines say.

use metrics::{describe_counter, describe_gauge, describe_histogram};

use super::{BATCH_DURATION_METRIC, BATCH_METRIC};

/// Describes them to the current recorder.
pub(super) fn describe() {
    describe_gauge!(
        "gradestore_build_info",
        "Always 1; the label says the version."
    );
    describe_gauge!("gradestore_records", "Records in the store.");
    describe_gauge!("gradestore_ready", "1 while reads are answered, else 0.");
    describe_gauge!(
        "gradestore_log_position",
        "Sequence number of the last batch applied."
    );
    describe_gauge!(
        "gradestore_log_end",
        "Sequence number of the log's last batch."
    );
    describe_gauge!(
        "gradestore_write_queue_patches",
        "Requests that wait for a batch: single writes, and groups of lines."
    );
    describe_histogram!(
        BATCH_METRIC,
        "Writes, patches and deletions, in a batch that this process sent."
    );
    describe_histogram!(
        BATCH_DURATION_METRIC,
        "Time from a batch's being sent until it came back and was applied."
    );
    describe_gauge!(
        "gradestore_log_lag_batches",
        "Batches that the log has and this replica has not applied."
    );
    describe_gauge!(
        "gradestore_log_lag_seconds",
        "Age of the last batch applied while the log has newer ones, else 0."
    );
    describe_counter!(
        "gradestore_log_reconnects_total",
        "Connections to the broker made anew."
    );
    describe_counter!(
        "gradestore_log_resumes_total",
        "Times that reading the log was taken up again where it had stopped."
    );
    describe_counter!(
        "gradestore_log_resends_total",
        "Batches sent again because nothing was heard of them."
    );
    describe_counter!(
        "gradestore_log_redeliveries_total",
        "Messages of the log that came again after they had been read."
    );
    describe_counter!(
        "gradestore_log_poisoned_total",
        "Messages of the log that are no batch and were skipped."
    );
    describe_gauge!(
        "gradestore_peers",
        "Other replicas on the log that answered when they were last asked."
    );
    describe_gauge!(
        "gradestore_peers_ready",
        "Other replicas on the log that said they were ready."
    );
    describe_counter!(
        "gradestore_log_gaps_total",
        "Times that reading ended because the log lacked the batch after the last one applied."
    );
    describe_counter!(
        "gradestore_resyncs_total",
        "Times that this replica began anew because the log went on without it or it had diverged."
    );
    describe_counter!(
        "gradestore_votes_rejected_total",
        "Checkpoints that were ignored because they are not signed with the cluster's password."
    );
    describe_counter!(
        "gradestore_announcements_rejected_total",
        "Announcements that were ignored because they are not signed with the cluster's password."
    );
    describe_counter!(
        "gradestore_checkpoints_compared_total",
        "Digests of other replicas compared with the own one at the same position."
    );
    describe_counter!(
        "gradestore_divergences_total",
        "Digests of other replicas that differed from the own one at the same position."
    );
    describe_gauge!(
        "gradestore_restore_buffered_batches",
        "Batches of the log read ahead while a backup is being restored."
    );
    describe_gauge!(
        "gradestore_restore_buffered_bytes",
        "About how much memory the batches read ahead take."
    );
    describe_counter!(
        "gradestore_patches_applied_total",
        "Patches applied to the store."
    );
    describe_counter!(
        "gradestore_deletions_applied_total",
        "Deletions applied to the store, of users that were there and that were not."
    );
    describe_gauge!(
        "gradestore_log_first",
        "Sequence number of the oldest batch in the log."
    );
    describe_gauge!(
        "gradestore_log_writable",
        "1 while the log takes batches, else 0."
    );
    describe_gauge!(
        "gradestore_restore_running",
        "1 while a backup is being restored."
    );
    describe_gauge!(
        "gradestore_restore_rows",
        "Rows that the last restore has read."
    );
    describe_gauge!(
        "gradestore_restore_bytes",
        "Bytes that the last restore has read."
    );
    describe_gauge!(
        "gradestore_restore_duration_seconds",
        "Time that the last restore took so far."
    );
    describe_counter!(
        "gradestore_snapshot_failures_total",
        "Snapshots that could not be written."
    );
    describe_gauge!(
        "gradestore_snapshot_age_seconds",
        "Time since a snapshot was finished; no number while there is none."
    );
    describe_gauge!(
        "gradestore_snapshot_position",
        "Position of the last snapshot."
    );
    describe_gauge!("gradestore_snapshot_rows", "Rows of the last snapshot.");
    describe_gauge!("gradestore_snapshot_bytes", "Size of the last snapshot.");
    describe_gauge!(
        "gradestore_snapshot_duration_seconds",
        "Time that the last snapshot took."
    );
    describe_gauge!(
        "gradestore_memory_limit_bytes",
        "Memory that this process may have: the least of its control groups' limits, that of its address space and the machine's."
    );
    describe_gauge!(
        "gradestore_memory_max_bytes",
        "Memory in use above which writes for new users are refused."
    );
    describe_gauge!(
        "gradestore_memory_used_bytes",
        "Memory in use: resident memory without what deleted records left to new ones."
    );
    describe_gauge!(
        "gradestore_store_full",
        "1 while memory in use is above its limit and writes for new users are refused."
    );
    describe_gauge!(
        "gradestore_data_dir_free_bytes",
        "Free bytes on the file system of the data directory; no number without one."
    );
    describe_gauge!(
        "gradestore_data_dir_size_bytes",
        "Size of the file system of the data directory; no number without one."
    );
}
