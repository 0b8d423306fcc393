//! Checks whether one user's history is linearizable: whether every operation can have taken effect
//! at
//! one moment between its invocation and its return. The search is that of Wing and Gong with
//! Lowe's
//! memoization.
//!
//! Each value is set by one write only, so a read identifies the writes it has seen. A write must
//! take
//! effect before the first read of its value returns, and no value may be overwritten that a read
//! has yet
//! to see. That leaves few choices, even with dozens of writes whose outcome is unknown; the search
//! stays
//! exhaustive. All deletions look the same to a read; of those with an unknown outcome the search
//! uses
//! the earliest. A general checker (todc-utils 0.1) took 12 s for 100 such operations and did not
//! finish
//! for 300.

use std::collections::{HashMap, HashSet};
use std::fmt;

use crate::harness::cluster::broker::FIELDS;

/// The values that a read sees, by field; 0 if the field was never set.
pub(crate) type Values = [i64; FIELDS.len()];

/// A user's record, if there is one.
pub(crate) type State = Option<Values>;

/// More steps than this and the check gives up.
const STEPS_MAX: usize = 500_000;

/// The effect of an operation.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum ChainEntry {
    /// Sets at least one field, none of them to 0.
    Set([Option<i64>; FIELDS.len()]),
    /// Removes the record.
    Delete,
    /// Returned this.
    Get(State),
}

/// One operation on one user. All times are of one clock.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) invoked: u64,
    /// `None` for a write that may take effect at any time after its invocation, or never.
    pub(crate) returned: Option<u64>,
    pub(crate) effect: ChainEntry,
    /// Shown in a failure.
    pub(crate) label: String,
}

/// Whether there is an order of the operations, starting without a record, that explains all of
/// them.
pub(crate) fn linearizable(ops: &[Op]) -> bool {
    Search::of(ops).is_some_and(|mut search| search.run())
}

/// An operation that must take effect.
struct Placed<'a> {
    invoked: u64,
    /// The latest time at which it must have taken effect.
    until: u64,
    effect: &'a ChainEntry,
}

struct Search<'a> {
    /// By invocation.
    ops: Vec<Placed<'a>>,
    /// Invocations of deletions with an unknown outcome. The first `spare_happened` of them took
    /// effect.
    spare: Vec<u64>,
    spare_happened: usize,
    /// Deletions among `ops` that have not taken effect.
    deletions_left: usize,
    /// Which operations have taken effect; all below `first_left` have.
    happened: Vec<bool>,
    first_left: usize,
    left: usize,
    state: State,
    /// The number of reads left that see a value in a field.
    wanted: HashMap<(usize, i64), usize>,
    /// The number of reads left that see no record.
    absent_wanted: usize,
    /// The states that the search has visited.
    tried: HashSet<(usize, Vec<usize>, usize, State)>,
}

/// A possible next operation.
#[derive(Clone, Copy)]
enum Choice {
    Op(usize),
    /// A deletion that may never take effect.
    Spare,
}

/// A step of the search, for backtracking.
struct Step {
    before: State,
    happened: Vec<usize>,
    spare: bool,
    /// The possible next writes.
    choices: Vec<Choice>,
}

impl<'a> Search<'a> {
    /// `None` if a read saw a value that was never written, or written later.
    fn of(ops: &'a [Op]) -> Option<Self> {
        let mut seen_until: HashMap<(usize, i64), u64> = HashMap::new();
        let mut wanted: HashMap<(usize, i64), usize> = HashMap::new();
        let mut absent_wanted = 0;
        for op in ops {
            let ChainEntry::Get(found) = &op.effect else {
                continue;
            };
            let returned = op.returned.expect("a read without a return has no result");
            absent_wanted += usize::from(found.is_none());
            for (field, value) in found.iter().flatten().enumerate() {
                *wanted.entry((field, *value)).or_default() += 1;
                let until = seen_until.entry((field, *value)).or_insert(returned);
                *until = returned.min(*until);
            }
        }
        let (mut placed, mut spare) = (Vec::new(), Vec::new());
        let mut written = HashSet::new();
        for op in ops {
            let mut until = op.returned;
            if let ChainEntry::Set(fields) = &op.effect {
                for key in keys(fields) {
                    assert!(written.insert(key), "{key:?} is written twice");
                    let seen = seen_until.get(&key).copied();
                    until = seen.into_iter().chain(until).min();
                }
            }
            if op.effect == ChainEntry::Delete && until.is_none() {
                spare.push(op.invoked);
            }
            // A write with an unknown outcome whose value was never read: the search may ignore it.
            let Some(until) = until else { continue };
            if until < op.invoked {
                return None;
            }
            let (invoked, effect) = (op.invoked, &op.effect);
            placed.push(Placed {
                invoked,
                until,
                effect,
            });
        }
        let nobodys = |key: &&(usize, i64)| key.1 != 0 && !written.contains(*key);
        if wanted.keys().any(|key| nobodys(&key)) {
            return None;
        }
        placed.sort_by_key(|op| op.invoked);
        spare.sort_unstable();
        let deletions = placed.iter().filter(|op| *op.effect == ChainEntry::Delete);
        Some(Self {
            deletions_left: deletions.count(),
            spare,
            spare_happened: 0,
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
            assert!(self.tried.len() < STEPS_MAX, "too many steps");
            let Some(step) = steps.last_mut() else {
                return false;
            };
            match step.choices.pop() {
                Some(write) => steps.push(self.step(Some(write))),
                None => {
                    let step = steps.pop().expect("the last one");
                    self.undo(step);
                }
            }
        }
        true
    }

    /// Lets `write` take effect, and then every read that matches the state: a read changes
    /// nothing, so it is best placed as early as possible.
    fn step(&mut self, write: Option<Choice>) -> Step {
        let mut step = Step {
            before: self.state,
            happened: Vec::new(),
            spare: false,
            choices: Vec::new(),
        };
        match write {
            Some(Choice::Op(write)) => {
                match self.ops[write].effect {
                    ChainEntry::Set(fields) => {
                        let state = self.state.get_or_insert_default();
                        for (field, value) in keys(fields) {
                            state[field] = value;
                        }
                    }
                    ChainEntry::Delete => self.state = None,
                    ChainEntry::Get(_) => {}
                }
                self.take_effect(write, &mut step);
            }
            Some(Choice::Spare) => {
                self.state = None;
                self.spare_happened += 1;
                step.spare = true;
            }
            None => {}
        }
        let mut next = self.next();
        while let Some(read) = next.iter().find(|op| self.reads_state(**op)) {
            self.take_effect(*read, &mut step);
            next = self.next();
        }
        let soonest = next.iter().map(|op| self.ops[*op].until).min();
        let ahead = (self.first_left..self.ops.len())
            .take_while(|op| Some(self.ops[*op].invoked) <= soonest)
            .filter(|op| self.happened[*op])
            .collect();
        let key = (self.first_left, ahead, self.spare_happened, self.state);
        if self.tried.insert(key) {
            let waiting = next.iter().filter(|op| self.sees_less(**op));
            let waiting = waiting.map(|op| self.ops[*op].until).min();
            next.retain(|op| self.may_write(*op));
            let mut choices: Vec<_> = next
                .into_iter()
                .map(|op| (self.ops[op].until, Choice::Op(op)))
                .collect();
            if self.may_use_spare_deletion(soonest) {
                choices.push((waiting.unwrap_or(u64::MAX), Choice::Spare));
            }
            // The last is tried first: the one with the earliest deadline.
            choices.sort_by_key(|(until, _)| std::cmp::Reverse(*until));
            step.choices = choices.into_iter().map(|(_, choice)| choice).collect();
        }
        step
    }

    /// Whether this is a read that sees less than the state has, which only a deletion can explain.
    fn sees_less(&self, op: usize) -> bool {
        let (ChainEntry::Get(found), Some(values)) = (self.ops[op].effect, self.state) else {
            return false;
        };
        found.is_none_or(|found| (0..FIELDS.len()).any(|at| found[at] == 0 && values[at] != 0))
    }

    /// Whether a deletion with an unknown outcome may be next, and helps: a read that is left sees
    /// less than the state has.
    fn may_use_spare_deletion(&self, soonest: Option<u64>) -> bool {
        let invoked = self.spare.get(self.spare_happened);
        let (Some(invoked), Some(values)) = (invoked, self.state) else {
            return false;
        };
        let lost = |(field, value): (usize, &i64)| *value != 0 && self.is_wanted(field, 0);
        let of_use = self.absent_wanted > 0 || values.iter().enumerate().any(lost);
        of_use && soonest.is_none_or(|soonest| *invoked <= soonest) && self.may_delete()
    }

    fn is_wanted(&self, field: usize, value: i64) -> bool {
        let reads = self.wanted.get(&(field, value));
        reads.is_some_and(|reads| *reads > 0)
    }

    /// Whether no value of the state is still to be read.
    fn may_delete(&self) -> bool {
        let values = self.state.unwrap_or_default();
        !(0..FIELDS.len()).any(|field| values[field] != 0 && self.is_wanted(field, values[field]))
    }

    /// The possible next operations: those invoked before any that is left must have taken effect.
    fn next(&self) -> Vec<usize> {
        let mut soonest = u64::MAX;
        let mut next = Vec::new();
        for (index, op) in self.ops.iter().enumerate().skip(self.first_left) {
            if op.invoked > soonest {
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
        matches!(self.ops[op].effect, ChainEntry::Get(found) if *found == self.state)
    }

    /// Whether this is a write that overwrites no value which is still to be read and cannot
    /// return.
    fn may_write(&self, op: usize) -> bool {
        let fields = match self.ops[op].effect {
            ChainEntry::Set(fields) => fields,
            ChainEntry::Delete => return self.may_delete(),
            ChainEntry::Get(_) => return false,
        };
        // After a deletion, unset fields and the absence of a record return.
        let comes_back = self.deletions_left > 0 || self.spare_happened < self.spare.len();
        let values = self.state.unwrap_or_default();
        let absent_wanted = self.state.is_none() && self.absent_wanted > 0;
        let lost = |(field, _)| {
            let value: i64 = values[field];
            (value != 0 || !comes_back) && self.is_wanted(field, value)
        };
        (comes_back || !absent_wanted) && !keys(fields).any(lost)
    }

    fn take_effect(&mut self, op: usize, step: &mut Step) {
        self.count(op, |reads| *reads -= 1);
        self.deletions_left -= usize::from(*self.ops[op].effect == ChainEntry::Delete);
        self.happened[op] = true;
        self.left -= 1;
        step.happened.push(op);
        while self.happened.get(self.first_left) == Some(&true) {
            self.first_left += 1;
        }
    }

    fn undo(&mut self, step: Step) {
        for op in step.happened {
            self.count(op, |reads| *reads += 1);
            self.deletions_left += usize::from(*self.ops[op].effect == ChainEntry::Delete);
            self.happened[op] = false;
            self.left += 1;
            self.first_left = self.first_left.min(op);
        }
        self.spare_happened -= usize::from(step.spare);
        self.state = step.before;
    }

    fn count(&mut self, op: usize, change: impl Fn(&mut usize)) {
        match self.ops[op].effect {
            ChainEntry::Set(_) | ChainEntry::Delete => {}
            ChainEntry::Get(None) => change(&mut self.absent_wanted),
            ChainEntry::Get(Some(values)) => {
                for key in values.iter().copied().enumerate() {
                    change(self.wanted.get_mut(&key).expect("counted before"));
                }
            }
        }
    }
}

/// The fields and values that a write sets.
pub(crate) fn keys(fields: &[Option<i64>; FIELDS.len()]) -> impl Iterator<Item = (usize, i64)> {
    let fields = fields.iter().enumerate();
    fields.filter_map(|(field, value)| Some((field, (*value)?)))
}

/// A minimal failing history: truncated at the first failure, and without every operation that is
/// not needed for it.
pub(crate) fn minimal_history(ops: &[Op]) -> Vec<Op> {
    let mut ends: Vec<u64> = ops.iter().filter_map(|op| op.returned).collect();
    ends.sort_unstable();
    let at = ends.partition_point(|end| linearizable(&truncated_at(ops, *end)));
    let mut minimal = ends
        .get(at)
        .map_or(ops.to_vec(), |end| truncated_at(ops, *end));
    minimal.sort_by_key(|op| op.invoked);
    let mut share = minimal.len().div_ceil(2);
    while share > 0 {
        let (mut from, before) = (0, minimal.len());
        while from < minimal.len() {
            let fewer = without(&minimal, from, from + share);
            match fewer.len() < minimal.len() && !linearizable(&fewer) {
                true => minimal = fewer,
                false => from += share,
            }
        }
        let again = share == 1 && minimal.len() < before;
        share = if again { 1 } else { share / 2 };
    }
    minimal
}

/// A history without the operations in a range. Writes stay if their values are read in the rest,
/// and deletions stay if a read in the rest misses a field. So a linearizable history stays
/// linearizable.
fn without(ops: &[Op], from: usize, to: usize) -> Vec<Op> {
    let within = |index: usize| (from..to).contains(&index);
    let mut seen = HashSet::new();
    let mut less_seen = false;
    for (index, op) in ops.iter().enumerate() {
        if let ChainEntry::Get(found) = op.effect
            && !within(index)
        {
            less_seen |= found.is_none_or(|values| values.contains(&0));
            seen.extend(found.into_iter().flatten().enumerate());
        }
    }
    let stays = |(index, op): &(usize, &Op)| match op.effect {
        _ if !within(*index) => true,
        ChainEntry::Set(fields) => keys(&fields).any(|key| seen.contains(&key)),
        ChainEntry::Delete => less_seen,
        ChainEntry::Get(_) => false,
    };
    let rest = ops.iter().enumerate().filter(stays);
    rest.map(|(_, op)| op.clone()).collect()
}

/// The history as it was known at `time`.
fn truncated_at(ops: &[Op], time: u64) -> Vec<Op> {
    let invoked = ops.iter().filter(|op| op.invoked <= time).cloned();
    let known = invoked.filter_map(|mut op| {
        if op.returned.is_some_and(|end| end > time) {
            op.returned = None;
        }
        (op.returned.is_some() || !matches!(op.effect, ChainEntry::Get(_))).then_some(op)
    });
    known.collect()
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |ns: u64| ns as f64 / 1e3;
        match self.returned {
            Some(returned) => write!(f, "{:12.1} to {:12.1} us", us(self.invoked), us(returned))?,
            None => write!(f, "{:12.1} to {:>12} us", us(self.invoked), "?")?,
        }
        write!(f, "  {:24} ", self.label)?;
        match &self.effect {
            ChainEntry::Set(fields) => {
                write!(f, "sets ")?;
                f.debug_map()
                    .entries(keys(fields).map(|(field, value)| (FIELDS[field], value)))
                    .finish()
            }
            ChainEntry::Delete => write!(f, "deletes"),
            ChainEntry::Get(None) => write!(f, "finds no record"),
            ChainEntry::Get(Some(values)) => write!(f, "finds {values:?}"),
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
