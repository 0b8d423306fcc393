#![no_main]

#[path = "../checks/stored_batch.rs"]
mod stored_batch;

libfuzzer_sys::fuzz_target!(|data: &[u8]| stored_batch::check(data));
