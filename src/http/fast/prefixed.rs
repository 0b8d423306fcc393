//! A socket for hyper, from which bytes were read before, and which hyper gives back.
//!
//! Between two exchanges hyper reads the next request. These bytes are looked at first: if the fast path
//! answers them, hyper gets nothing and the connection returns to the fast path.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;

use super::{FastPath, READ_BYTES};
use crate::http::connection::Connection;

/// Gives hyper the bytes that were read before, and then those of the socket.
pub(in crate::http) struct Prefixed {
    read: Vec<u8>,
    io: TokioIo<TcpStream>,
    connection: Arc<Connection>,
    path: Option<Arc<FastPath>>,
}

impl Prefixed {
    pub(in crate::http) fn new(
        read: Vec<u8>,
        stream: TcpStream,
        connection: Arc<Connection>,
        path: Option<Arc<FastPath>>,
    ) -> Self {
        let io = TokioIo::new(stream);
        Self {
            read,
            io,
            connection,
            path,
        }
    }

    /// The bytes that hyper has not taken, and the socket.
    pub(in crate::http) fn into_parts(self) -> (Vec<u8>, TcpStream) {
        (self.read, self.io.into_inner())
    }

    /// Reads the beginning of the next request. Pending if the connection returns to the fast path, too.
    fn poll_next_request(&mut self, path: &FastPath, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut space = [const { MaybeUninit::uninit() }; READ_BYTES];
        let mut read = ReadBuf::uninit(&mut space);
        std::task::ready!(Pin::new(self.io.inner_mut()).poll_read(cx, &mut read))?;
        self.read.extend_from_slice(read.filled());
        if path.takes(&self.read) {
            self.connection.return_to_fast_path();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl Read for Prefixed {
    #[expect(clippy::indexing_slicing, reason = "`given` is at most its length")]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut space: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read.is_empty() {
            let Some(path) = this
                .path
                .clone()
                .filter(|_| this.connection.is_between_exchanges())
            else {
                return Pin::new(&mut this.io).poll_read(cx, space);
            };
            std::task::ready!(this.poll_next_request(&path, cx))?;
        }
        let given = this.read.len().min(space.remaining());
        space.put_slice(&this.read[..given]);
        this.read.drain(..given);
        if this.read.is_empty() {
            this.read = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl Write for Prefixed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes once it has written all that it holds.
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        if let Poll::Ready(Ok(())) = flushed {
            self.connection.flushed();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
