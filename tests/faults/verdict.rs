//! The checks at the end of every cell.

use std::collections::{BTreeMap, BTreeSet};

use crate::fault::Fault;
use crate::harness::backup_files::read_backup;
use crate::harness::cluster::broker::{FIELDS, LoggedWrite, Write};
use crate::harness::cluster::seeded::apply;
use crate::load::assert_not_older;
use crate::scene::{A, B, C, Scene};

/// Stops the clients and checks the log and all replicas.
pub(crate) async fn check(mut scene: Scene, fault: Fault) {
    for index in [A, B, C] {
        scene.ready(index).await;
    }
    scene.load.progress(&[A, B, C], 10).await;
    let record = scene.load.stop().await;
    // Every acknowledged write is in the log at its position, no write is there twice, and all
    // three replicas hold the state that the log gives.
    let nodes = scene.nodes().map(Clone::clone);
    let nodes = [&nodes[0], &nodes[1], &nodes[2]];
    let client = scene.client().await;
    scene
        .reference
        .check(&client, &nodes, &record.acknowledged)
        .await;

    let reference = &scene.reference;
    let stored = reference
        .log
        .values()
        .flatten()
        .filter_map(LoggedWrite::set);
    let stored: BTreeSet<&Write> = stored.collect();
    for rejected in &record.rejected {
        assert!(
            !stored.contains(rejected),
            "rejected, but in the log: {rejected:?}"
        );
    }

    // Every replica returns each acknowledged write, or a later one of the same client.
    let mut last: BTreeMap<(&str, usize), &Write> = BTreeMap::new();
    for acknowledged in &record.acknowledged {
        let write = acknowledged.write.set().unwrap();
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
                    assert_not_older(write, grade[name].as_i64().unwrap());
                }
            }
        }
    }
    if let Some(backup) = scene.backup.take() {
        check_backup(&scene, fault, backup);
    }
}

/// Checks that a backup in progress is complete and correct, or was aborted with an error.
fn check_backup(scene: &Scene, fault: Fault, backup: Option<Vec<u8>>) {
    let Some(file) = backup else {
        assert!(fault.may_abort_backups(), "the backup was aborted");
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
