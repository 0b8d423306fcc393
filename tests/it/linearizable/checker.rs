//! Whether one user's history can be told as if every operation had happened at one moment between
//! its beginning and its end: the search of Wing and Gong, with Lowe's memory of what was tried.
//!
//! It rests on each value being set by one write alone. A read then names the writes it has seen, a
//! write must have happened before the first read that saw it ends, and nothing may be overwritten
//! that a read has yet to see. So there is rarely more than one way to go on, even with dozens of
//! writes whose end is unknown; the search stays exhaustive. A general one (todc-utils 0.1) took 12 s
//! for 100 such operations, and for 300 more than was waited for.

use std::collections::{HashMap, HashSet};
use std::fmt;

use crate::broker::FIELDS;

/// What a read sees, by field; 0 is a field that was never set.
pub(crate) type Values = [i64; FIELDS.len()];

/// A user's record, if there is one.
pub(crate) type State = Option<Values>;

/// More steps than this and a history is too entangled to be checked.
const STEPS_MAX: usize = 500_000;

/// What an operation did.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Did {
    /// Sets at least one field, none of them to 0.
    Set([Option<i64>; FIELDS.len()]),
    /// Found this.
    Get(State),
}

/// One operation on one user. Times are of one clock.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) begun: u64,
    /// `None` for a write that may happen at any time after it has begun, or never.
    pub(crate) ended: Option<u64>,
    pub(crate) did: Did,
    /// Who it was, for who reads a failure.
    pub(crate) who: String,
}

/// Whether there is an order, beginning with no record, in which all of it makes sense.
pub(crate) fn linearizable(ops: &[Op]) -> bool {
    Search::of(ops).is_some_and(|mut search| search.run())
}

/// An operation that has its place in every order.
struct Placed<'a> {
    begun: u64,
    /// The end of the time in which it must have happened.
    until: u64,
    did: &'a Did,
}

struct Search<'a> {
    /// By their beginning.
    ops: Vec<Placed<'a>>,
    /// Those that have happened; all below `first_left` have.
    happened: Vec<bool>,
    first_left: usize,
    left: usize,
    state: State,
    /// How many reads have yet to find a value in a field.
    wanted: HashMap<(usize, i64), usize>,
    /// How many have yet to find no record.
    absent_wanted: usize,
    /// All that has been tried: what had happened, and what came of it.
    tried: HashSet<(usize, Vec<usize>, State)>,
}

/// A step of the search, to be taken back.
struct Step {
    before: State,
    happened: Vec<usize>,
    /// The writes that may be next.
    choices: Vec<usize>,
}

impl<'a> Search<'a> {
    /// `None` if a read has seen what nobody wrote, or wrote later.
    fn of(ops: &'a [Op]) -> Option<Self> {
        let mut seen_until: HashMap<(usize, i64), u64> = HashMap::new();
        let mut wanted: HashMap<(usize, i64), usize> = HashMap::new();
        let mut absent_wanted = 0;
        for op in ops {
            let Did::Get(found) = &op.did else { continue };
            let ended = op.ended.expect("a read without an end has seen nothing");
            absent_wanted += usize::from(found.is_none());
            for (field, value) in found.iter().flatten().enumerate() {
                *wanted.entry((field, *value)).or_default() += 1;
                let until = seen_until.entry((field, *value)).or_insert(ended);
                *until = ended.min(*until);
            }
        }
        let mut placed = Vec::new();
        let mut written = HashSet::new();
        for op in ops {
            let mut until = op.ended;
            if let Did::Set(fields) = &op.did {
                for key in keys(fields) {
                    assert!(written.insert(key), "{key:?} is written twice");
                    let seen = seen_until.get(&key).copied();
                    until = seen.into_iter().chain(until).min();
                }
            }
            // A write that may never have happened and that nobody has seen: as well it did not.
            let Some(until) = until else { continue };
            if until < op.begun {
                return None;
            }
            let (begun, did) = (op.begun, &op.did);
            placed.push(Placed { begun, until, did });
        }
        let nobodys = |key: &&(usize, i64)| key.1 != 0 && !written.contains(*key);
        if wanted.keys().any(|key| nobodys(&key)) {
            return None;
        }
        placed.sort_by_key(|op| op.begun);
        Some(Self {
            happened: vec![false; placed.len()],
            left: placed.len(),
            ops: placed,
            first_left: 0,
            state: None,
            wanted,
            absent_wanted,
            tried: HashSet::new(),
        })
    }

    fn run(&mut self) -> bool {
        let mut steps = vec![self.step(None)];
        while self.left > 0 {
            assert!(self.tried.len() < STEPS_MAX, "too entangled to be checked");
            let Some(step) = steps.last_mut() else {
                return false;
            };
            match step.choices.pop() {
                Some(write) => steps.push(self.step(Some(write))),
                None => {
                    let step = steps.pop().expect("the last one");
                    self.take_back(step);
                }
            }
        }
        true
    }

    /// Lets `write` happen, and every read that then can: a read changes nothing, so it may as well
    /// happen as soon as it finds what it found.
    fn step(&mut self, write: Option<usize>) -> Step {
        let mut step = Step {
            before: self.state,
            happened: Vec::new(),
            choices: Vec::new(),
        };
        if let Some(write) = write {
            if let Did::Set(fields) = self.ops[write].did {
                let state = self.state.get_or_insert_default();
                for (field, value) in keys(fields) {
                    state[field] = value;
                }
            }
            self.happens(write, &mut step);
        }
        let mut next = self.next();
        while let Some(read) = next.iter().find(|op| self.reads_state(**op)) {
            self.happens(*read, &mut step);
            next = self.next();
        }
        let soonest = next.iter().map(|op| self.ops[*op].until).min();
        let ahead = (self.first_left..self.ops.len())
            .take_while(|op| Some(self.ops[*op].begun) <= soonest)
            .filter(|op| self.happened[*op])
            .collect();
        if self.tried.insert((self.first_left, ahead, self.state)) {
            next.retain(|op| self.may_write(*op));
            // The last is taken first: what must have happened soonest.
            next.sort_by_key(|op| std::cmp::Reverse(self.ops[*op].until));
            step.choices = next;
        }
        step
    }

    /// What can be next: all that has begun before anything that is left must have happened.
    fn next(&self) -> Vec<usize> {
        let mut soonest = u64::MAX;
        let mut next = Vec::new();
        for (index, op) in self.ops.iter().enumerate().skip(self.first_left) {
            if op.begun > soonest {
                break;
            }
            if !self.happened[index] {
                soonest = soonest.min(op.until);
                next.push(index);
            }
        }
        next
    }

    fn reads_state(&self, op: usize) -> bool {
        matches!(self.ops[op].did, Did::Get(found) if *found == self.state)
    }

    /// Whether this is a write, and overwrites nothing that is still to be read.
    fn may_write(&self, op: usize) -> bool {
        let Did::Set(fields) = self.ops[op].did else {
            return false;
        };
        let wanted = |key| self.wanted.get(&key).is_some_and(|reads| *reads > 0);
        let values = self.state.unwrap_or_default();
        let absent_wanted = self.state.is_none() && self.absent_wanted > 0;
        !absent_wanted && !keys(fields).any(|(field, _)| wanted((field, values[field])))
    }

    fn happens(&mut self, op: usize, step: &mut Step) {
        self.count(op, |reads| *reads -= 1);
        self.happened[op] = true;
        self.left -= 1;
        step.happened.push(op);
        while self.happened.get(self.first_left) == Some(&true) {
            self.first_left += 1;
        }
    }

    fn take_back(&mut self, step: Step) {
        for op in step.happened {
            self.count(op, |reads| *reads += 1);
            self.happened[op] = false;
            self.left += 1;
            self.first_left = self.first_left.min(op);
        }
        self.state = step.before;
    }

    fn count(&mut self, op: usize, change: impl Fn(&mut usize)) {
        match self.ops[op].did {
            Did::Set(_) => {}
            Did::Get(None) => change(&mut self.absent_wanted),
            Did::Get(Some(values)) => {
                for key in values.iter().copied().enumerate() {
                    change(self.wanted.get_mut(&key).expect("counted before"));
                }
            }
        }
    }
}

/// What a write sets.
pub(crate) fn keys(fields: &[Option<i64>; FIELDS.len()]) -> impl Iterator<Item = (usize, i64)> {
    let fields = fields.iter().enumerate();
    fields.filter_map(|(field, value)| Some((field, (*value)?)))
}

/// The least of a history that fails: what had begun when it first failed, without all that can be
/// left out and it still fails.
pub(crate) fn shortest(ops: &[Op]) -> Vec<Op> {
    let mut ends: Vec<u64> = ops.iter().filter_map(|op| op.ended).collect();
    ends.sort_unstable();
    let at = ends.partition_point(|end| linearizable(&until(ops, *end)));
    let mut least = ends.get(at).map_or(ops.to_vec(), |end| until(ops, *end));
    least.sort_by_key(|op| op.begun);
    let mut share = least.len().div_ceil(2);
    while share > 0 {
        let (mut from, before) = (0, least.len());
        while from < least.len() {
            let fewer = without(&least, from, from + share);
            match fewer.len() < least.len() && !linearizable(&fewer) {
                true => least = fewer,
                false => from += share,
            }
        }
        let again = share == 1 && least.len() < before;
        share = if again { 1 } else { share / 2 };
    }
    least
}

/// A history without a part of it; but what the rest has seen stays. If the whole makes sense, so
/// does this: reads change nothing, nor does what is overwritten before it is read.
fn without(ops: &[Op], from: usize, to: usize) -> Vec<Op> {
    let within = |index: usize| (from..to).contains(&index);
    let mut seen = HashSet::new();
    for (index, op) in ops.iter().enumerate() {
        if let Did::Get(Some(values)) = op.did
            && !within(index)
        {
            seen.extend(values.into_iter().enumerate());
        }
    }
    let stays = |(index, op): &(usize, &Op)| match op.did {
        _ if !within(*index) => true,
        Did::Set(fields) => keys(&fields).any(|key| seen.contains(&key)),
        Did::Get(_) => false,
    };
    let rest = ops.iter().enumerate().filter(stays);
    rest.map(|(_, op)| op.clone()).collect()
}

/// A history as it was at some time.
fn until(ops: &[Op], time: u64) -> Vec<Op> {
    let begun = ops.iter().filter(|op| op.begun <= time).cloned();
    let known = begun.filter_map(|mut op| {
        if op.ended.is_some_and(|end| end > time) {
            op.ended = None;
        }
        (op.ended.is_some() || matches!(op.did, Did::Set(_))).then_some(op)
    });
    known.collect()
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |ns: u64| ns as f64 / 1e3;
        match self.ended {
            Some(ended) => write!(f, "{:12.1} to {:12.1} us", us(self.begun), us(ended))?,
            None => write!(f, "{:12.1} to {:>12} us", us(self.begun), "?")?,
        }
        write!(f, "  {:24} ", self.who)?;
        match &self.did {
            Did::Set(fields) => {
                write!(f, "sets ")?;
                f.debug_map()
                    .entries(keys(fields).map(|(field, value)| (FIELDS[field], value)))
                    .finish()
            }
            Did::Get(None) => write!(f, "finds no record"),
            Did::Get(Some(values)) => write!(f, "finds {values:?}"),
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
