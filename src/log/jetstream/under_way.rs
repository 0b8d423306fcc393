//! This process's batches between the broker and the reader.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::grade::Write;

/// Batches that were sent and did not come back yet. There are very few: the writer's bound.
///
/// Their writes are at hand, so none is decoded again; and whoever still waits for the broker's
/// word on one need not wait any longer once it has come back.
#[derive(Default)]
pub(super) struct UnderWay(Mutex<Vec<Sent>>);

struct Sent {
    number: u64,
    writes: Arc<[Write]>,
    back: oneshot::Sender<()>,
}

impl UnderWay {
    /// Notes a batch before it is sent; tells when it has come back.
    pub(super) fn add(&self, number: u64, writes: Arc<[Write]>) -> oneshot::Receiver<()> {
        let (back, came_back) = oneshot::channel();
        self.0.lock().push(Sent {
            number,
            writes,
            back,
        });
        came_back
    }

    /// The batch has come back: its writes, if they are at hand.
    pub(super) fn take(&self, number: u64) -> Option<Arc<[Write]>> {
        let sent = self.remove(number)?;
        // Who heard from the broker first does not listen any more.
        let _ = sent.back.send(());
        Some(sent.writes)
    }

    /// The batch is given up. Should it come all the same, it is read like anybody's.
    pub(super) fn give_up(&self, number: u64) {
        self.remove(number);
    }

    fn remove(&self, number: u64) -> Option<Sent> {
        let mut sent = self.0.lock();
        let at = sent.iter().position(|sent| sent.number == number)?;
        Some(sent.swap_remove(at))
    }
}
