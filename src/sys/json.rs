//! simd-json with buffers that are reused between calls.

use std::cell::RefCell;

use simd_json::Buffers;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    buffers: Buffers,
}

/// Calls `parse` with a copy of `json` and reused buffers. The copy is necessary because simd-json
/// rewrites strings in place, and the bytes of a request or a message are shared.
pub(crate) fn in_place<T>(json: &[u8], parse: impl FnOnce(&mut [u8], &mut Buffers) -> T) -> T {
    SCRATCH.with_borrow_mut(|Scratch { bytes, buffers }| {
        bytes.clear();
        bytes.extend_from_slice(json);
        parse(bytes, buffers)
    })
}
