//! The socket that hyper uses, with bytes that the fast path has already read.
//!
//! Between two exchanges hyper reads the next request. This module inspects these bytes first: if the
//! fast path handles the request, hyper gets nothing and the connection returns to the fast path.

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
use crate::http::connection::ConnectionState;

/// Yields the bytes that were read before, then those of the socket.
pub(in crate::http) struct PrefixedStream {
    read: Vec<u8>,
    io: TokioIo<TcpStream>,
    connection: Arc<ConnectionState>,
    path: Option<Arc<FastPath>>,
}

impl PrefixedStream {
    pub(in crate::http) fn new(
        read: Vec<u8>,
        stream: TcpStream,
        connection: Arc<ConnectionState>,
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

    /// Reads the beginning of the next request. Also pending if the connection returns to the fast path.
    fn poll_next_request(&mut self, path: &FastPath, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut buffer = [const { MaybeUninit::uninit() }; READ_BYTES];
        let mut read = ReadBuf::uninit(&mut buffer);
        std::task::ready!(Pin::new(self.io.inner_mut()).poll_read(cx, &mut read))?;
        self.read.extend_from_slice(read.filled());
        if path.accepts(&self.read) {
            self.connection.return_to_fast_path();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl Read for PrefixedStream {
    #[expect(clippy::indexing_slicing, reason = "`copied` is at most its length")]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read.is_empty() {
            let Some(path) = this
                .path
                .clone()
                .filter(|_| this.connection.is_between_exchanges())
            else {
                return Pin::new(&mut this.io).poll_read(cx, buffer);
            };
            std::task::ready!(this.poll_next_request(&path, cx))?;
        }
        let copied = this.read.len().min(buffer.remaining());
        buffer.put_slice(&this.read[..copied]);
        this.read.drain(..copied);
        if this.read.is_empty() {
            this.read = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl Write for PrefixedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes once it has written all of its buffer.
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
