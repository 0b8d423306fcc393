//! What must hold in the end, whatever has happened.

use std::collections::{BTreeMap, BTreeSet};

use crate::fault::Fault;
use crate::harness::backup_files::read_backup;
use crate::harness::cluster::broker::{FIELDS, LoggedWrite, Write};
use crate::harness::cluster::seeded::apply;
use crate::load::assert_not_before;
use crate::scene::{A, B, C, Scene};

/// Ends the clients and judges.
pub(crate) async fn judge(mut scene: Scene, fault: Fault) {
    for index in [A, B, C] {
        scene.ready(index).await;
    }
    scene.load.progress(&[A, B, C], 10).await;
    let record = scene.load.stop().await;
    // Answered writes are in the log where they were said to be, nothing is there twice, and all
    // three are equal to the log's sum.
    let nodes = scene.nodes().map(Clone::clone);
    let nodes = [&nodes[0], &nodes[1], &nodes[2]];
    let client = scene.client().await;
    scene
        .reference
        .check(&client, &nodes, &record.answered)
        .await;

    let reference = &scene.reference;
    let stored = reference
        .log
        .values()
        .flatten()
        .filter_map(LoggedWrite::set);
    let stored: BTreeSet<&Write> = stored.collect();
    for refused in &record.refused {
        assert!(
            !stored.contains(refused),
            "refused and written: {refused:?}"
        );
    }

    // And each can be read everywhere, or a later one of the same client.
    let mut last: BTreeMap<(&str, usize), &Write> = BTreeMap::new();
    for answered in &record.answered {
        let write = answered.write.set().unwrap();
        let known = last.entry((&write.user, write.field)).or_insert(write);
        if write.value > known.value {
            *known = write;
        }
    }
    let users: BTreeSet<&str> = last.keys().map(|(user, _)| *user).collect();
    for node in nodes {
        for user in &users {
            let grade = node.get_at(user, reference.position).await;
            for (field, name) in FIELDS.iter().enumerate() {
                if let Some(write) = last.get(&(*user, field)) {
                    assert_not_before(write, grade[name].as_i64().unwrap());
                }
            }
        }
    }
    if let Some(backup) = scene.backup.take() {
        judge_backup(&scene, fault, backup);
    }
}

/// A backup that was being sent is whole and right, or does not look whole.
fn judge_backup(scene: &Scene, fault: Fault, backup: Option<Vec<u8>>) {
    let Some(file) = backup else {
        assert!(fault.breaks_backups(), "the backup was broken off");
        return;
    };
    let (store, summary) = read_backup(&file);
    let (head, end) = summary.records.unwrap();
    let reference = &scene.reference;
    assert!(head.position <= end.position && end.position <= reference.position);
    let after = reference.log.range(head.position + 1..);
    for write in after.flat_map(|(_, writes)| writes) {
        apply(&store, write);
    }
    assert_eq!(store.digest(), reference.store.digest());
}
