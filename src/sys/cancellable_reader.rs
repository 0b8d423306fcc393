//! A blocking reader that another task can stop.

use std::io::{self, Read};

use tokio_util::sync::CancellationToken;

/// Fails every read once `cancel` is cancelled.
pub(crate) struct CancellableReader<R> {
    pub(crate) source: R,
    pub(crate) cancel: CancellationToken,
}

impl<R: Read> Read for CancellableReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.cancel.is_cancelled() {
            false => self.source.read(buffer),
            true => Err(io::Error::other("the read was cancelled")),
        }
    }
}
