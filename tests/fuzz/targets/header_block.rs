#![no_main]

#[path = "../checks/header_block.rs"]
mod header_block;

libfuzzer_sys::fuzz_target!(|data: &[u8]| header_block::check(data));
