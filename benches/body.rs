//! Parsing a `POST /set` body and writing a record as JSON, compared with serde_json.
//!
//! `cargo bench --bench body`

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gradestore::grade::{FIELDS, Patch, USER_ID, UserGrade};
use gradestore::http::parse_patch;
use serde::ser::{Serialize, SerializeMap, Serializer};

const ONE_FIELD: &str = r#"{"user_id":"1000000000123","spp":23}"#;
const ALL_FIELDS: &str = r#"{"user_id":"1000000000123","postpaid_limit":100123,"spp":23,"shipping_fee":0,"return_fee":-50}"#;
const ESCAPED: &str = r#"{"user_id":"\u0410\u043d\u043d\u0430 \"A\"","postpaid_limit":100123,"spp":23,"shipping_fee":0,"return_fee":-50}"#;
const REJECTED: &str = r#"{"user_id":"1000000000123","spp":1.5}"#;

fn parse(c: &mut Criterion) {
    for (name, body) in [
        ("one field", ONE_FIELD),
        ("all fields", ALL_FIELDS),
        ("escaped id", ESCAPED),
        ("rejected", REJECTED),
    ] {
        let mut group = c.benchmark_group(format!("parse {name}"));
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function("gradestore", |bencher| {
            bencher.iter(|| parse_patch(black_box(body.as_bytes())));
        });
        group.bench_function("serde_json", |bencher| {
            bencher.iter(|| serde_json::from_slice::<Patch>(black_box(body.as_bytes())));
        });
    }
}

/// A record that serde_json writes.
struct SerdeGrade(UserGrade);

impl Serialize for SerdeGrade {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(FIELDS.len() + 1))?;
        map.serialize_entry(USER_ID, &self.0.user_id)?;
        for (name, value) in FIELDS.iter().zip(self.0.values) {
            map.serialize_entry(name, &value)?;
        }
        map.end()
    }
}

fn write(c: &mut Criterion) {
    let grade = UserGrade {
        user_id: Box::from("1000000000123"),
        values: [100_123, 23, 0, -50],
    };
    let serde_grade = SerdeGrade(grade.clone());
    let mut json = Vec::new();
    grade.write_json(&mut json);
    assert_eq!(serde_json::to_vec(&serde_grade).ok(), Some(json.clone()));

    let mut group = c.benchmark_group("write a record");
    group.throughput(Throughput::Bytes(json.len() as u64));
    group.bench_function("gradestore", |bencher| {
        bencher.iter(|| {
            json.clear();
            black_box(&grade).write_json(&mut json);
        });
    });
    group.bench_function("serde_json", |bencher| {
        bencher.iter(|| {
            json.clear();
            serde_json::to_writer(&mut json, black_box(&serde_grade))
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = parse, write
}
criterion_main!(benches);
