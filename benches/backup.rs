//! Chunks of a backup on one thread: writing and parsing rows, compared with csv-async; deflating
//! and inflating, compared with zlib-rs. Also prints the sizes.
//!
//! `cargo bench --bench backup`

#![expect(clippy::unwrap_used, reason = "a bench may panic")]

use std::hint::black_box;
use std::io::{Read, Write};
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use csv_async::{AsyncReaderBuilder, AsyncWriterBuilder, StringRecord};
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::{DeflateEncoder, GzEncoder};
use futures_util::FutureExt;
use gradestore::backup::{
    BackupError, BackupWriter, ChunkSource, FORMAT, HeadRecord, ReadProgress, read,
};
use gradestore::grade::{
    self, Changes, FIELD_COUNT, FIELDS, Patch, USER_ID, Values, check_user_id,
};
use gradestore::log::Chain;
use gradestore::store::{RecordBatch, Store};

// A private module of the library.
#[expect(dead_code, unreachable_pub, reason = "a module of the bench here")]
#[path = "../src/backup/row.rs"]
mod row;

const CHUNK_BYTES: usize = 256 * 1024;
/// About 2.5 MiB of text, for the end-to-end benchmarks.
const STORE_USERS: u64 = 60_000;

/// The records of `load/generate.py`.
fn store() -> Store {
    let store = Store::new();
    for user in 0..STORE_USERS {
        let values = std::array::from_fn(|field| {
            let n = user * FIELD_COUNT as u64 + field as u64;
            match n % 101 {
                0 => i64::MIN,
                1 => i64::MAX,
                2..20 => 0,
                odd if odd % 2 == 1 => -(n as i64),
                _ => n as i64,
            }
        });
        store.apply_all(&[grade::Write::Set(Patch {
            user_id: (1_000_000_000_000 + user).to_string(),
            changes: Changes::all(values),
        })]);
    }
    store
}

fn scanned(store: &Store) -> Vec<(String, Values)> {
    let (mut scan, mut batch) = (store.scan(), RecordBatch::default());
    let mut rows = Vec::new();
    while scan.next_into(&mut batch) {
        rows.extend(batch.iter().map(|(id, values)| (id.to_owned(), *values)));
    }
    rows
}

/// The rows of one chunk, and its text.
fn chunk() -> (Vec<(String, Values)>, Vec<u8>) {
    let mut rows = scanned(&store());
    let mut text = Vec::new();
    let mut used = 0;
    for (id, values) in &rows {
        if text.len() >= CHUNK_BYTES {
            break;
        }
        row::write(id, values, &mut text);
        used += 1;
    }
    rows.truncate(used);
    (rows, text)
}

fn write_native<'a>(rows: impl Iterator<Item = (&'a str, &'a Values)>, text: &mut Vec<u8>) {
    for (id, values) in rows {
        row::write(id, values, text);
    }
}

fn refs(rows: &[(String, Values)]) -> impl Iterator<Item = (&str, &Values)> {
    rows.iter().map(|(id, values)| (id.as_str(), values))
}

fn write_csv_async<'a>(rows: impl Iterator<Item = (&'a str, &'a Values)>, text: &mut Vec<u8>) {
    let mut csv = AsyncWriterBuilder::new().create_writer(text);
    let mut numbers = [itoa::Buffer::new(); FIELD_COUNT];
    for (id, values) in rows {
        let numbers = numbers.iter_mut().zip(values);
        let numbers = numbers.map(|(buffer, value)| buffer.format(*value).as_bytes());
        let record = std::iter::once(id.as_bytes()).chain(numbers);
        // Writing to memory is never pending.
        csv.write_record(record).now_or_never().unwrap().unwrap();
    }
    csv.flush().now_or_never().unwrap().unwrap();
}

fn parse_native(text: &[u8]) -> (u32, i64) {
    let mut sum = 0i64;
    let text = std::str::from_utf8(text).unwrap();
    let rows = row::parse(text, FIELD_COUNT, 1, |row| {
        sum = row.values.iter().fold(sum, |sum, v| sum.wrapping_add(*v));
    });
    (rows.unwrap(), sum)
}

fn parse_csv_async(text: &[u8]) -> (u32, i64) {
    let mut csv = AsyncReaderBuilder::new()
        .has_headers(false)
        .create_reader(text);
    let mut record = StringRecord::new();
    let (mut rows, mut sum) = (0, 0i64);
    while csv
        .read_record(&mut record)
        .now_or_never()
        .unwrap()
        .unwrap()
    {
        check_user_id(record.get(0).unwrap()).unwrap();
        for number in record.iter().skip(1) {
            sum = sum.wrapping_add(number.parse().unwrap());
        }
        rows += 1;
    }
    (rows, sum)
}

fn rows(c: &mut Criterion) {
    let (rows, text) = chunk();
    let mut other = Vec::new();
    write_csv_async(refs(&rows), &mut other);
    assert!(other == text);
    assert_eq!(parse_native(&text), parse_csv_async(&text));

    let mut group = c.benchmark_group("write rows");
    group.throughput(Throughput::Elements(rows.len() as u64));
    let mut out = Vec::with_capacity(2 * CHUNK_BYTES);
    group.bench_function("gradestore", |bencher| {
        bencher.iter(|| {
            out.clear();
            write_native(refs(black_box(&rows)), &mut out);
        });
    });
    group.bench_function("csv-async", |bencher| {
        bencher.iter(|| {
            out.clear();
            write_csv_async(refs(black_box(&rows)), &mut out);
        });
    });
    group.finish();

    let mut group = c.benchmark_group("parse rows");
    group.throughput(Throughput::Elements(rows.len() as u64));
    for (name, parse) in [
        ("gradestore", parse_native as fn(&[u8]) -> (u32, i64)),
        ("csv-async", parse_csv_async),
    ] {
        group.bench_function(name, |bencher| bencher.iter(|| parse(black_box(&text))));
    }
}

fn deflate_libdeflater(text: &[u8], level: i32) -> Vec<u8> {
    let level = libdeflater::CompressionLvl::new(level).unwrap();
    let mut deflate = libdeflater::Compressor::new(level);
    let mut out = vec![0; deflate.deflate_compress_bound(text.len())];
    let length = deflate.deflate_compress(text, &mut out).unwrap();
    out.truncate(length);
    out
}

fn deflate_zlib_rs(text: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::with_capacity(text.len()), Compression::new(level));
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn deflate(c: &mut Criterion) {
    let (_, text) = chunk();
    let mut group = c.benchmark_group("deflate");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("libdeflater 1", |bencher| {
        bencher.iter(|| deflate_libdeflater(black_box(&text), 1));
    });
    println!(
        "libdeflater 1: {} bytes of {}",
        deflate_libdeflater(&text, 1).len(),
        text.len()
    );
    for level in [1, 2, 3] {
        group.bench_function(format!("zlib-rs {level}"), |bencher| {
            bencher.iter(|| deflate_zlib_rs(black_box(&text), level));
        });
        println!(
            "zlib-rs {level}: {} bytes",
            deflate_zlib_rs(&text, level).len()
        );
    }
    group.finish();

    let deflated = deflate_libdeflater(&text, 1);
    let mut group = c.benchmark_group("inflate");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("libdeflater", |bencher| {
        let mut inflate = libdeflater::Decompressor::new();
        let mut out = vec![0; text.len()];
        bencher.iter(|| inflate.deflate_decompress(black_box(&deflated), &mut out));
    });
    group.bench_function("zlib-rs", |bencher| {
        let mut out = vec![0; text.len()];
        bencher.iter(|| DeflateDecoder::new(black_box(&deflated[..])).read_exact(&mut out));
    });
}

fn native_file(store: &Store) -> Vec<u8> {
    let head = HeadRecord {
        format: FORMAT,
        created_ns: 1_700_000_000_000_000_000,
        log_id: "bench".into(),
        position: 0,
        time_ns: 0,
        chain: Chain::default(),
        previous_chain: Chain::default(),
        rows_expected: STORE_USERS,
        shard_seed: None,
    };
    let (mut writer, mut file) = BackupWriter::start(&head);
    let source = ChunkSource::new(store);
    while let Some(chunk) = source.next() {
        writer.add(&chunk);
        file.extend_from_slice(&chunk.bytes);
    }
    file.extend_from_slice(&writer.end(&head.position()));
    file
}

/// A backup written with csv-async and zlib-rs.
fn csv_async_file(store: &Store, level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    let header = format!("{USER_ID},{}\n", FIELDS.join(","));
    encoder.write_all(header.as_bytes()).unwrap();
    let (mut scan, mut batch) = (store.scan(), RecordBatch::default());
    let mut text = Vec::new();
    while scan.next_into(&mut batch) {
        text.clear();
        write_csv_async(batch.iter(), &mut text);
        encoder.write_all(&text).unwrap();
    }
    encoder.finish().unwrap()
}

fn files(c: &mut Criterion) {
    let store = store();
    let (native, third_party) = (native_file(&store), csv_async_file(&store, 1));
    println!(
        "file: {} bytes, csv-async and zlib-rs 1: {}",
        native.len(),
        third_party.len()
    );
    let mut group = c.benchmark_group("write a file");
    group.throughput(Throughput::Elements(STORE_USERS));
    group.bench_function("gradestore", |bencher| bencher.iter(|| native_file(&store)));
    group.bench_function("csv-async, zlib-rs 1", |bencher| {
        bencher.iter(|| csv_async_file(&store, 1));
    });
    group.finish();
    // The first with a thread per core, the second, a third-party file, with one thread.
    let mut group = c.benchmark_group("read a file");
    group.throughput(Throughput::Elements(STORE_USERS));
    for (name, file) in [("gradestore", &native), ("third-party", &third_party)] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let summary =
                    read(&file[..], &RecordBatch::digest, &ReadProgress::default()).unwrap();
                assert_eq!(summary.rows, STORE_USERS);
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(20);
    targets = rows, deflate, files
}
criterion_main!(benches);
