//! Messages that an earlier build published are applied: see tests/golden.

use std::fs;

use crate::cluster::unreadable_headers::Publisher;
use crate::disk::golden::{assert_golden_records, golden};
use crate::harness::cluster::broker::Broker;

#[tokio::test]
async fn golden_messages_are_applied() {
    let broker = Broker::start().await;
    let replica = broker.replica().await;
    let mut publisher = Publisher::connect(broker.address).await;
    let mut last = 0;
    for number in 1..=5 {
        let message = fs::read_to_string(golden(&format!("messages/{number}"))).unwrap();
        let (block, payload) = message.split_once("\r\n\r\n").unwrap();
        let block = format!("{block}\r\n\r\n");
        last = publisher.publish(block.as_bytes(), payload).await;
    }
    replica.ready_at(last).await;
    assert_golden_records(&replica).await;
}
