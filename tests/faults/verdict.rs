//! The invariants at the end of each cell.

use std::collections::{BTreeMap, BTreeSet};

use crate::broker::{FIELDS, Logged, Write, get_at};
use crate::disk::restored;
use crate::fault::Fault;
use crate::load::assert_not_before;
use crate::scene::{A, B, C, Scene};
use crate::seeded::apply;

/// Stops the clients and checks the invariants.
pub(crate) async fn check(mut scene: Scene, fault: Fault) {
    for index in [A, B, C] {
        scene.ready(index).await;
    }
    scene.load.progress(&[A, B, C], 10).await;
    let record = scene.load.stop().await;
    // Acknowledged writes are in the log at their positions, no write is there twice, and all three
    // replicas have the state that results from the log.
    let nodes = scene.nodes().map(Clone::clone);
    let nodes = [&nodes[0], &nodes[1], &nodes[2]];
    let client = scene.client().await;
    scene.truth.check(&client, &nodes, &record.answered).await;

    let truth = &scene.truth;
    let stored = truth.log.values().flatten().filter_map(Logged::set);
    let stored: BTreeSet<&Write> = stored.collect();
    for refused in &record.refused {
        assert!(
            !stored.contains(refused),
            "rejected and written: {refused:?}"
        );
    }

    // Every replica serves each of them, or a later one of the same client.
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
            let grade = get_at(node, user, truth.position).await;
            for (field, name) in FIELDS.iter().enumerate() {
                if let Some(write) = last.get(&(*user, field)) {
                    assert_not_before(write, grade[name].as_i64().unwrap());
                }
            }
        }
    }
    if let Some(backup) = scene.backup.take() {
        check_backup(&scene, fault, backup);
    }
}

/// A backup is complete and right, or the client has noticed that it was aborted.
fn check_backup(scene: &Scene, fault: Fault, backup: Option<Vec<u8>>) {
    let Some(file) = backup else {
        assert!(fault.breaks_backups(), "the backup was aborted");
        return;
    };
    let (store, summary) = restored(&file);
    let (head, end) = summary.records.unwrap();
    let truth = &scene.truth;
    assert!(head.position <= end.position && end.position <= truth.position);
    let after = truth.log.range(head.position + 1..);
    for write in after.flat_map(|(_, writes)| writes) {
        apply(&store, write);
    }
    assert_eq!(store.digest(), truth.store.digest());
}
