#![no_main]

#[path = "../checks/backup_reader.rs"]
mod backup_reader;

libfuzzer_sys::fuzz_target!(|data: &[u8]| backup_reader::check(data));
