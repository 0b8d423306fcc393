//! Reads backups: our own in parallel, a member a task, and any other gzip CSV one row after the
//! other.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use parking_lot::Mutex;
use tokio::sync::watch;
use xxhash_rust::xxh3::Xxh3Default;

use super::member::{self, Content, FIXED_BYTES, Kind, TRAILER_BYTES};
use super::{BackupError, End, FORMAT, Head, row, third_party_csv, threads_for};
use crate::grade::{Digest, FIELD_COUNT};
use crate::log::Seq;
use crate::store::RecordBatch;

/// The longest name in the first member.
const NAME_BYTES_MAX: usize = 256;
/// Bytes read before it is known what a file is.
const START_BYTES: usize = FIXED_BYTES + 4;
/// In how many bytes at the start of a foreign file no member of ours may begin.
const FOREIGN_BYTES: u64 = 64 * 1024;

/// How far a restore has come; others may look while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    rows: AtomicU64,
    bytes: AtomicU64,
    head: watch::Sender<Option<Head>>,
    /// A bit a field.
    fields: AtomicU32,
    line: AtomicU64,
}

impl Progress {
    /// Rows handed out.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Bytes read.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// About how many rows there are; 0 while unknown.
    #[must_use]
    pub fn rows_expected(&self) -> u64 {
        let head = self.head.borrow();
        head.as_ref().map_or(0, |head| head.rows_expected)
    }

    /// What the backup says first, as soon as that has been read; never for a foreign one.
    pub async fn head(&self) -> Head {
        let mut heads = self.head.subscribe();
        loop {
            if let Some(head) = &*heads.borrow_and_update() {
                return head.clone();
            }
            // The sender is in `self`.
            let _ = heads.changed().await;
        }
    }

    /// Whether the file has a column for the field at `index` of [`FIELDS`](crate::grade::FIELDS);
    /// known before the first row is handed out.
    #[must_use]
    pub fn has_field(&self, index: usize) -> bool {
        index < FIELD_COUNT && self.fields.load(Ordering::Relaxed) >> index & 1 == 1
    }

    /// The line of the text, the header row's being 1, that the first of the rows which are being
    /// handed out stands in. The others are in those after it. For the sink of [`read_in_order`].
    #[must_use]
    pub fn line(&self) -> u64 {
        self.line.load(Ordering::Relaxed)
    }

    pub(super) fn set_fields(&self, fields: impl Iterator<Item = usize>) {
        let bits = fields.fold(0, |bits, index| bits | 1 << index);
        self.fields.store(bits, Ordering::Relaxed);
    }

    pub(super) fn set_line(&self, line: u64) {
        self.line.store(line, Ordering::Relaxed);
    }

    pub(super) fn set_bytes(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_rows(&self, rows: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
    }
}

/// What a whole backup said of itself and what was found in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Its first and its last record; none in a foreign file.
    pub records: Option<(Head, End)>,
    /// Rows.
    pub rows: u64,
    /// The sum of the rows' digests.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
}

/// What the backup in `source` says first; none if it is a foreign one. It holds once [`read`] has
/// accepted the file.
///
/// # Errors
/// The file does not begin as a backup does.
pub fn head(mut source: impl Read + Unpin + Send) -> Result<Option<Head>, BackupError> {
    let start = read_start(&mut source)?;
    match known(&start)? {
        Kind::Ours(_) => {
            let progress = Progress::default();
            let mut own = Own::new(io::Cursor::new(start).chain(source), &progress);
            own.read_head().map(|(head, _fields)| Some(head))
        }
        _ => Ok(None),
    }
}

fn read_start(source: &mut impl Read) -> Result<Vec<u8>, BackupError> {
    let mut start = Vec::with_capacity(START_BYTES);
    let taken = source.take(START_BYTES as u64).read_to_end(&mut start);
    taken.map_err(|error| BackupError::Io { at: 0, error })?;
    Ok(start)
}

/// Takes rows, and returns the sum of their digests.
pub type Sink<'a> = dyn Fn(&RecordBatch) -> Digest + Sync + 'a;

/// Reads `source` to its end and hands every row to `sink`, from several threads if there are many.
///
/// Blocks; not for an async task. Rows are handed out before the end record has been seen: `sink`
/// must collect into something that is thrown away on an error.
///
/// # Errors
/// The file is not a whole, unchanged backup; see [`BackupError`].
pub fn read(
    source: impl Read + Unpin + Send,
    sink: &Sink<'_>,
    progress: &Progress,
) -> Result<Summary, BackupError> {
    read_by(usize::MAX, source, sink, progress)
}

/// The same by this thread alone, so that rows come in the order of the file.
///
/// # Errors
/// The file is not a whole, unchanged backup; see [`BackupError`].
pub fn read_in_order(
    source: impl Read + Unpin + Send,
    sink: &Sink<'_>,
    progress: &Progress,
) -> Result<Summary, BackupError> {
    read_by(1, source, sink, progress)
}

fn read_by(
    threads_max: usize,
    mut source: impl Read + Unpin + Send,
    sink: &Sink<'_>,
    progress: &Progress,
) -> Result<Summary, BackupError> {
    let start = read_start(&mut source)?;
    let kind = known(&start)?;
    let mut source = io::Cursor::new(start).chain(source);
    match kind {
        Kind::Ours(_) => Own::new(source, progress).read(threads_max, sink),
        _ => {
            // What has lost its head only would pass for a whole foreign file, whatever else it lost.
            let mut ahead = Vec::new();
            let taken = (&mut source).take(FOREIGN_BYTES).read_to_end(&mut ahead);
            taken.map_err(|error| BackupError::Io { at: 0, error })?;
            if member::begins_ours(&ahead) {
                let what = "a backup of gradestore has lost its first member";
                return Err(BackupError::Damaged { at: 0, what });
            }
            third_party_csv::read(io::Cursor::new(ahead).chain(source), sink, progress)
        }
    }
}

/// What a file is that begins with `start`: ours or a foreign one.
fn known(start: &[u8]) -> Result<Kind, BackupError> {
    if start.len() < START_BYTES && member::begins_gzip(start) {
        let at = start.len() as u64;
        return Err(BackupError::Truncated { at });
    }
    match member::kind_of(start) {
        Kind::NotGzip => Err(BackupError::NotGzip),
        Kind::Unknown => Err(BackupError::Damaged {
            at: 0,
            what: "the gzip header has an extra field that is not known",
        }),
        kind => Ok(kind),
    }
}

/// The position that the backup in `source` ends at; 0 for a foreign file. Looks at the members'
/// headers alone: what it says holds once [`read`] has accepted the file.
///
/// # Errors
/// The headers can't be followed to the end record.
pub fn end_position(mut source: impl Read + Unpin + Send) -> Result<Seq, BackupError> {
    let start = read_start(&mut source)?;
    if !matches!(member::kind_of(&start), Kind::Ours(_)) {
        return Ok(0);
    }
    let progress = Progress::default();
    let mut own = Own::new(io::Cursor::new(start).chain(source), &progress);
    own.read_head()?;
    let mut skipped = Vec::new();
    loop {
        let at = own.at;
        let (header, content) = own.read_header()?;
        match content {
            Content::End(end) => return Ok(end.position),
            Content::Rows { member, .. } if (member as usize) <= member::MEMBER_BYTES_MAX => {
                skipped.clear();
                let rest = (member as usize).saturating_sub(header.len());
                own.read_some(rest, &mut skipped)?;
            }
            _ => {
                let what = "its members do not lead to an end record";
                return Err(BackupError::Damaged { at, what });
            }
        }
    }
}

/// A member of rows, to be inflated and parsed by some thread.
struct Task {
    at: u64,
    first_row: u64,
    fields: usize,
    text_bytes: usize,
    rows: u32,
    /// From the first deflated byte to the trailer.
    bytes: Vec<u8>,
}

/// Reads one of our own files.
struct Own<'a, R> {
    source: R,
    /// Bytes read.
    at: u64,
    hash: Xxh3Default,
    progress: &'a Progress,
}

impl<'a, R: Read> Own<'a, R> {
    fn new(source: R, progress: &'a Progress) -> Self {
        Self {
            source,
            at: 0,
            hash: Xxh3Default::new(),
            progress,
        }
    }

    fn read(mut self, threads_max: usize, sink: &Sink<'_>) -> Result<Summary, BackupError> {
        let (head, fields) = self.read_head()?;
        self.progress.set_fields(0..fields);
        self.progress.head.send_replace(Some(head.clone()));
        let threads = threads_for(head.rows_expected).min(threads_max);
        let (end, rows, checksum, digest) = match threads {
            1 => self.read_alone(fields, sink)?,
            _ => self.read_with(threads, fields, sink)?,
        };
        self.finish(head, end, rows, digest, checksum)
    }

    /// All by this thread, so that what happens when depends on no other.
    fn read_alone(
        &mut self,
        fields: usize,
        sink: &Sink<'_>,
    ) -> Result<(End, u64, u128, Digest), BackupError> {
        let progress = self.progress;
        let mut worker = Worker::new(sink, progress);
        let (end, rows, checksum) = self.read_members(fields, &mut |task| worker.read(&task))?;
        Ok((end, rows, checksum, worker.digest))
    }

    fn read_with(
        &mut self,
        threads: usize,
        fields: usize,
        sink: &Sink<'_>,
    ) -> Result<(End, u64, u128, Digest), BackupError> {
        let progress = self.progress;
        let digest = Mutex::new(Digest::default());
        let (tasks, queue) = sync_channel::<Task>(threads);
        let queue = Mutex::new(queue);
        let failed = AtomicBool::new(false);
        let (end, rows, checksum) = thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|_| {
                    scope.spawn(|| {
                        let worked = work(&queue, sink, progress);
                        if worked.is_err() {
                            failed.store(true, Ordering::Relaxed);
                            // Until the members are no longer read, nobody may wait for a place.
                            while queue.lock().recv().is_ok() {}
                        }
                        worked.map(|added| *digest.lock() += added)
                    })
                })
                .collect();
            let members = self.read_members(fields, &mut |task| {
                // A worker has said why it ended, and that is told first.
                let at = task.at;
                let what = "a member could not be read";
                match tasks.send(task).is_err() || failed.load(Ordering::Relaxed) {
                    true => Err(BackupError::Damaged { at, what }),
                    false => Ok(()),
                }
            });
            drop(tasks);
            let mut worked = Ok(());
            for worker in workers {
                let ended = worker.join().unwrap_or(Err(BackupError::Damaged {
                    at: 0,
                    what: "a thread that reads it has ended",
                }));
                worked = worked.and(ended);
            }
            // A worker's error comes first: it made the reading stop.
            worked.and(members)
        })?;
        Ok((end, rows, checksum, digest.into_inner()))
    }

    /// The first member: what it says, and how many fields a row has.
    fn read_head(&mut self) -> Result<(Head, usize), BackupError> {
        let at = self.at;
        let damaged = |what| BackupError::Damaged { at, what };
        let (header, content) = self.read_header()?;
        let Content::Head(head) = content else {
            return Err(damaged("the first member is missing"));
        };
        if head.format > FORMAT {
            return Err(BackupError::Newer {
                found: head.format,
                known: FORMAT,
            });
        }
        let mut first = header;
        while self.read_some(1, &mut first)?.is_none_or(|byte| byte != 0) {
            if first.len() > FIXED_BYTES + usize::from(u16::MAX) + NAME_BYTES_MAX {
                return Err(damaged("the name in the first gzip header does not end"));
            }
        }
        self.read_some(5, &mut first)?;
        let length = match first.last_chunk::<5>() {
            Some([1, low, high, not_low, not_high]) if [!low, !high] == [*not_low, *not_high] => {
                usize::from(u16::from_le_bytes([*low, *high]))
            }
            _ => return Err(damaged("the header row is not stored as it should be")),
        };
        let mut text = Vec::new();
        self.read_some(length, &mut text)?;
        let mut trailer = Vec::new();
        self.read_some(TRAILER_BYTES, &mut trailer)?;
        let line =
            std::str::from_utf8(&text).map_err(|_| damaged("the header row is not UTF-8"))?;
        let fields = row::parse_header(line)?;
        // All of it is as this program writes it; the end's checksum covers what this can't know.
        let mut expected = Vec::new();
        member::write_head(&mut expected, &head, &text);
        first.extend_from_slice(&text);
        first.extend_from_slice(&trailer);
        if expected != first {
            return Err(damaged("the first member has changed"));
        }
        self.hash.update(&first);
        Ok((head, fields))
    }

    /// Passes on the members of rows; returns the end record, the rows before it and the checksum.
    fn read_members(
        &mut self,
        fields: usize,
        pass_on: &mut dyn FnMut(Task) -> Result<(), BackupError>,
    ) -> Result<(End, u64, u128), BackupError> {
        let mut rows_before = 0;
        loop {
            let at = self.at;
            let damaged = |what| BackupError::Damaged { at, what };
            let (header, content) = self.read_header()?;
            match content {
                Content::Head(_) => return Err(damaged("a first member stands among the others")),
                Content::Rows { member, text, rows } => {
                    let (member, text) = (member as usize, text as usize);
                    if member > member::MEMBER_BYTES_MAX || text > member::TEXT_BYTES_MAX {
                        return Err(damaged("a member claims to be larger than any can be"));
                    }
                    let rest = member.checked_sub(header.len());
                    let rest = rest.filter(|rest| *rest > TRAILER_BYTES);
                    let rest =
                        rest.ok_or(damaged("a member claims to be shorter than its header"))?;
                    let mut bytes = Vec::with_capacity(rest);
                    self.read_some(rest, &mut bytes)?;
                    self.hash.update(&header);
                    self.hash.update(&bytes);
                    pass_on(Task {
                        at,
                        first_row: rows_before + 1,
                        fields,
                        text_bytes: text,
                        rows,
                        bytes,
                    })?;
                    rows_before += u64::from(rows);
                }
                Content::End(end) => {
                    let mut last = header;
                    self.read_some(2 + TRAILER_BYTES, &mut last)?;
                    let mut expected = Vec::new();
                    member::write_end(&mut expected, &end);
                    if expected != last {
                        return Err(damaged("the last member has changed"));
                    }
                    return Ok((end, rows_before, self.hash.digest128()));
                }
            }
        }
    }

    fn finish(
        mut self,
        head: Head,
        end: End,
        rows: u64,
        digest: Digest,
        checksum: u128,
    ) -> Result<Summary, BackupError> {
        let at = self.at;
        let more = (&mut self.source).take(1).read_to_end(&mut Vec::new());
        if more.map_err(|error| BackupError::Io { at, error })? > 0 {
            return Err(BackupError::Trailing { at });
        }
        let checks = [
            ("row counts", end.rows.to_string(), rows.to_string()),
            ("digests", end.digest.clone(), digest.to_string()),
            (
                "checksums",
                end.checksum.clone(),
                format!("{checksum:032x}"),
            ),
        ];
        for (what, recorded, found) in checks {
            if recorded != found {
                return Err(BackupError::Mismatch {
                    what,
                    recorded,
                    found,
                });
            }
        }
        Ok(Summary {
            records: Some((head, end)),
            rows,
            digest,
            bytes: at,
        })
    }

    /// A member's header up to the end of FEXTRA, and what that says.
    fn read_header(&mut self) -> Result<(Vec<u8>, Content), BackupError> {
        let at = self.at;
        let damaged = |what| BackupError::Damaged { at, what };
        let mut header = Vec::with_capacity(64);
        self.read_some(START_BYTES, &mut header)?;
        let Kind::Ours(extra_bytes) = member::kind_of(&header) else {
            return Err(damaged("a gzip member of ours should begin here"));
        };
        let rest = (FIXED_BYTES + 2 + extra_bytes).checked_sub(START_BYTES);
        self.read_some(
            rest.ok_or(damaged("an extra field is too short"))?,
            &mut header,
        )?;
        let extra = header.get(FIXED_BYTES + 2..).unwrap_or_default();
        let content = member::content_of(extra).map_err(damaged)?;
        Ok((header, content))
    }

    /// Appends the next `wanted` bytes, all of them; returns the last one.
    fn read_some(&mut self, wanted: usize, bytes: &mut Vec<u8>) -> Result<Option<u8>, BackupError> {
        let read = (&mut self.source).take(wanted as u64).read_to_end(bytes);
        let read = read.map_err(|error| BackupError::Io { at: self.at, error })?;
        self.at += read as u64;
        self.progress.set_bytes(self.at);
        match read == wanted {
            true => Ok(bytes.last().copied()),
            false => Err(BackupError::Truncated { at: self.at }),
        }
    }
}

/// Takes tasks until there are no more; the digest of the rows in them.
fn work(
    queue: &Mutex<Receiver<Task>>,
    sink: &Sink<'_>,
    progress: &Progress,
) -> Result<Digest, BackupError> {
    let mut worker = Worker::new(sink, progress);
    loop {
        let task = queue.lock().recv();
        let Ok(task) = task else {
            return Ok(worker.digest);
        };
        worker.read(&task)?;
    }
}

/// Reads members of rows one after the other.
struct Worker<'a> {
    sink: &'a Sink<'a>,
    progress: &'a Progress,
    inflate: libdeflater::Decompressor,
    text: Vec<u8>,
    rows: RecordBatch,
    /// The sum of the rows' digests so far.
    digest: Digest,
}

impl<'a> Worker<'a> {
    fn new(sink: &'a Sink<'a>, progress: &'a Progress) -> Self {
        Self {
            sink,
            progress,
            inflate: libdeflater::Decompressor::new(),
            text: Vec::new(),
            rows: RecordBatch::default(),
            digest: Digest::default(),
        }
    }

    fn read(&mut self, task: &Task) -> Result<(), BackupError> {
        let damaged = |what| BackupError::Damaged { at: task.at, what };
        let split = task.bytes.len().saturating_sub(TRAILER_BYTES);
        let (deflated, trailer) = task.bytes.split_at(split);
        let (inflate, text) = (&mut self.inflate, &mut self.text);
        member::inflate(deflated, trailer, task.text_bytes, inflate, text).map_err(damaged)?;
        let text = std::str::from_utf8(text).map_err(|_| damaged("a member is not UTF-8"))?;
        let (batch, sink, progress) = (&mut self.rows, self.sink, self.progress);
        batch.clear();
        let mut first_row = task.first_row;
        let mut pass_on = |batch: &mut RecordBatch| {
            progress.set_line(row::line_of(first_row));
            first_row += batch.len() as u64;
            self.digest += sink(batch);
            batch.clear();
        };
        let rows = row::parse(text, task.fields, task.first_row, |row| {
            batch.push(row.user_id, row.values);
            if batch.is_full() {
                pass_on(batch);
            }
        })?;
        pass_on(batch);
        if rows != task.rows {
            return Err(damaged("a member has another number of rows than it says"));
        }
        self.progress.add_rows(u64::from(task.rows));
        Ok(())
    }
}
