//! Says after `cargo test` which integration tests it left out.

#[cfg(feature = "test-all")]
fn main() {}

#[cfg(not(feature = "test-all"))]
fn main() {
    println!(
        "
Left out, because they need installed programs:

    cluster              nats-server
    api::schemathesis    nats-server, schemathesis
    disk::backup_tools   Python, a mount namespace (root or user namespaces)
    disk::full_disk      a mount namespace (root or user namespaces)
    ops::curl            curl
    ops::page            nats-server, Chromium

`make test` installs what is missing into .tools/ and runs all tests. Once it is installed,
`cargo test --features test-all` runs them without the simulator and the tests of tests/ops.
"
    );
}
