//! What the tests share: nodes, requests, child processes, files, and NATS.

mod node;
mod ports;
mod process;
mod reserved_port;
mod unused_proxy;

pub(crate) mod backup_files;
#[cfg(feature = "test-all")]
pub(crate) mod cluster;
pub(crate) mod gated_log;
#[cfg(feature = "test-all")]
pub(crate) mod small_disk;
pub(crate) mod wire;

pub(crate) use node::{InProcessNode, Node, opening};
pub(crate) use ports::{
    Ports, delete_request, get_request, incomplete_ndjson_request, incomplete_set_request,
    pending_set, set_request, set_request_framed,
};
pub(crate) use process::{
    Process, collect_output, program, program_at, run, without_root_capabilities, wrapped_by,
};
pub(crate) use reserved_port::ReservedPort;
pub(crate) use unused_proxy::UnusedProxy;

pub(crate) const PASSWORD: &str = "correct horse";
/// `admin` and [`PASSWORD`].
pub(crate) const AUTHORIZATION: &str = "Basic YWRtaW46Y29ycmVjdCBob3JzZQ==";
/// All three ports are assigned by the system.
pub(crate) const ANY_PORTS: [&str; 3] = [
    "--write-addr=127.0.0.1:0",
    "--read-addr=127.0.0.1:0",
    "--ops-addr=127.0.0.1:0",
];
