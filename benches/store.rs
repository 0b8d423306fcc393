//! Get, apply and scan with one and two threads, of the store and of `scc::HashMap` with the same
//! records.
//!
//! `cargo bench --bench store`, or `-- get/10000000` for a part of it. Users are in random order.

mod stores;

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gradestore::grade::{Changes, FIELD_COUNT, Patch, Write};
use gradestore::store::Store;
use stores::{Grades, Scc, check, filled, with_id};

const ID_BYTES: usize = 13;

fn store(c: &mut Criterion) {
    // Without `--bench` this is a test run: one round of each is enough.
    let measured = std::env::args().any(|arg| arg == "--bench");
    let counts: &[u64] = if measured {
        &[10_000, 10_000_000]
    } else {
        &[10_000]
    };
    for count in counts {
        apply_batches(c, *count);
        single_calls::<Store>(c, *count);
        single_calls::<Scc>(c, *count);
    }
}

/// Compares one call for a batch with one call per write.
fn apply_batches(c: &mut Criterion, count: u64) {
    const BATCH: usize = 64;
    let store: Store = filled(count, ID_BYTES);
    let mut random = 1;
    // More than fit in a cache.
    let writes: Vec<Write> = (0..1_u64 << 20)
        .map(|round| {
            random = next_random(random);
            let user_id = with_id((random >> 33) % count, ID_BYTES, |id| Box::from(id));
            let mut changes = Changes::default();
            changes.set(round as usize % FIELD_COUNT, round as i64);
            Write::Set(Patch { user_id, changes })
        })
        .collect();
    let mut group = c.benchmark_group(format!("batch of 64/{count}"));
    group.throughput(Throughput::Elements(BATCH as u64));
    let mut batches = writes.chunks(BATCH).cycle();
    group.bench_function("one call", |bencher| {
        bencher.iter(|| batches.next().map(|batch| store.apply_all(batch)));
    });
    group.bench_function("one call per write", |bencher| {
        bencher.iter(|| {
            for write in batches.next().unwrap_or_default() {
                store.apply_all(std::slice::from_ref(write));
            }
        });
    });
}

fn single_calls<G: Grades>(c: &mut Criterion, count: u64) {
    let grades: G = filled(count, ID_BYTES);
    for threads in [1, 2] {
        let get = |user, _| {
            let values = with_id(user, ID_BYTES, |id| grades.get(id));
            assert!(black_box(values).is_some());
        };
        measure(c, "get", G::NAME, count, threads, get);
        let apply = |user, round| {
            let mut changes = Changes::default();
            changes.set(round as usize % FIELD_COUNT, round as i64);
            with_id(user, ID_BYTES, |user_id| {
                grades.apply(&Patch { user_id, changes });
            });
        };
        measure(c, "apply", G::NAME, count, threads, apply);

        let mut group = c.benchmark_group(format!("scan/{count}"));
        group.throughput(Throughput::Elements(count * threads));
        group.bench_function(BenchmarkId::new(G::NAME, threads), |bencher| {
            bencher.iter_custom(|rounds| {
                in_threads(threads, |_| {
                    for _ in 0..rounds {
                        let mut sum = 0_i64;
                        grades.scan(|id, values| {
                            sum = sum.wrapping_add(values[0]).wrapping_add(id.len() as i64);
                        });
                        black_box(sum);
                    }
                })
            });
        });
    }
    check(&grades, count);
}

/// Measures `call(user, round)` for random users. The time is that of a round in which each thread
/// makes one call.
fn measure(
    c: &mut Criterion,
    what: &str,
    name: &str,
    count: u64,
    threads: u64,
    call: impl Fn(u64, u64) + Sync,
) {
    let mut group = c.benchmark_group(format!("{what}/{count}"));
    group.throughput(Throughput::Elements(threads));
    group.bench_function(BenchmarkId::new(name, threads), |bencher| {
        bencher.iter_custom(|rounds| {
            in_threads(threads, |thread| {
                let mut random = thread + 1;
                for round in 0..rounds {
                    random = next_random(random);
                    call((random >> 33) % count, round);
                }
            })
        });
    });
}

/// The next random number: Knuth's MMIX, whose low bits are poor.
fn next_random(random: u64) -> u64 {
    random
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407)
}

/// The time until all threads have finished `work`.
fn in_threads(threads: u64, work: impl Fn(u64) + Sync) -> Duration {
    let started = Instant::now();
    thread::scope(|scope| {
        for thread in 0..threads {
            let work = &work;
            scope.spawn(move || work(thread));
        }
    });
    started.elapsed()
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = store
}
criterion_main!(benches);
