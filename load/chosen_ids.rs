//! Prints patches of ids that a fixed hash puts into one of 1,024 shards, a line for each: what a
//! client can prepare that knows the hash of a store.
//!
//! `cargo run --release -p gradestore-load --bin chosen_ids -- 2000000 >target/chosen.ndjson`

use std::hash::BuildHasher as _;
use std::io::{self, BufWriter, Write as _};

use foldhash::quality::FixedState;
use gradestore::grade::{FIELDS, USER_ID};

const SHARDS: u64 = 1024;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut left: u64 = std::env::args().nth(1).ok_or("how many ids?")?.parse()?;
    let hasher = FixedState::with_seed(0);
    let field = FIELDS.first().ok_or("a grade has no fields")?;
    let mut out = BufWriter::new(io::stdout().lock());
    let mut id = [b'0'; 13];
    while left > 0 {
        increment(&mut id);
        if hasher.hash_one(&id[..]) % SHARDS == 0 {
            let id = std::str::from_utf8(&id)?;
            writeln!(out, r#"{{"{USER_ID}":"{id}","{field}":1}}"#)?;
            left -= 1;
        }
    }
    Ok(out.flush()?)
}

/// Adds 1 to a decimal number: formatting each would take most of the time.
fn increment(digits: &mut [u8]) {
    for digit in digits.iter_mut().rev() {
        match digit {
            b'9' => *digit = b'0',
            _ => return *digit += 1,
        }
    }
}
