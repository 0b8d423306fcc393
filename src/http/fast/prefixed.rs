//! A socket from which more has been read than was used.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Gives hyper what has been read, and then what comes.
pub(in crate::http) struct Rewound {
    read: Vec<u8>,
    io: TokioIo<TcpStream>,
}

impl Rewound {
    pub(in crate::http) fn new(read: Vec<u8>, stream: TcpStream) -> Self {
        let io = TokioIo::new(stream);
        Self { read, io }
    }

    pub(in crate::http) fn into_inner(self) -> TcpStream {
        self.io.into_inner()
    }
}

impl Read for Rewound {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut room: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, room);
        }
        let given = this.read.len().min(room.remaining());
        room.put_slice(this.read.get(..given).unwrap_or_default());
        this.read.drain(..given);
        if this.read.is_empty() {
            this.read = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl Write for Rewound {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
