//! Whether one user's history can be told as if every operation had happened at one moment between
//! its beginning and its end: the search of Wing and Gong, with Lowe's memory of what was tried.
//!
//! It rests on each value being set by one write alone. A read then names the writes it has seen, a
//! write must have happened before the first read that saw it ends, and nothing may be overwritten
//! that a read has yet to see. So there is rarely more than one way to go on, even with dozens of
//! writes whose end is unknown; the search stays exhaustive. Deletions all do the same, so a read does
//! not name one; but of those whose end is unknown, none is better than another, and the first one
//! will do. A general one (todc-utils 0.1) took 12 s
//! for 100 such operations, and for 300 more than was waited for.

use std::collections::{HashMap, HashSet};
use std::fmt;

use crate::harness::cluster::broker::FIELDS;

/// What a read sees, by field; 0 is a field that was never set.
pub(crate) type Values = [i64; FIELDS.len()];

/// A user's record, if there is one.
pub(crate) type State = Option<Values>;

/// More steps than this and a history is too entangled to be checked.
const STEPS_MAX: usize = 500_000;

/// What an operation did.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Sets at least one field, none of them to 0.
    Set([Option<i64>; FIELDS.len()]),
    /// Removes the record.
    Delete,
    /// Found this.
    Get(State),
}

/// One operation on one user. Times are of one clock.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) invoked: u64,
    /// `None` for a write that may happen at any time after it has begun, or never.
    pub(crate) returned: Option<u64>,
    pub(crate) effect: Effect,
    /// Who it was, for who reads a failure.
    pub(crate) label: String,
}

/// Whether there is an order, beginning with no record, in which all of it makes sense.
pub(crate) fn linearizable(ops: &[Op]) -> bool {
    Search::of(ops).is_some_and(|mut search| search.run())
}

/// An operation that has its place in every order.
struct Placed<'a> {
    invoked: u64,
    /// The end of the time in which it must have happened.
    until: u64,
    effect: &'a Effect,
}

struct Search<'a> {
    /// By their beginning.
    ops: Vec<Placed<'a>>,
    /// When the deletions began that may happen at any time after, or never; the first so many have.
    spare: Vec<u64>,
    spare_happened: usize,
    /// Deletions among `ops` that have not happened.
    deletions_left: usize,
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
    tried: HashSet<(usize, Vec<usize>, usize, State)>,
}

/// What may be next.
#[derive(Clone, Copy)]
enum Choice {
    Op(usize),
    /// A deletion that may as well never happen.
    Spare,
}

/// A step of the search, to be taken back.
struct Step {
    before: State,
    happened: Vec<usize>,
    spare: bool,
    /// The writes that may be next.
    choices: Vec<Choice>,
}

impl<'a> Search<'a> {
    /// `None` if a read has seen what nobody wrote, or wrote later.
    fn of(ops: &'a [Op]) -> Option<Self> {
        let mut seen_until: HashMap<(usize, i64), u64> = HashMap::new();
        let mut wanted: HashMap<(usize, i64), usize> = HashMap::new();
        let mut absent_wanted = 0;
        for op in ops {
            let Effect::Get(found) = &op.effect else {
                continue;
            };
            let returned = op.returned.expect("a read without an end has seen nothing");
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
            if let Effect::Set(fields) = &op.effect {
                for key in keys(fields) {
                    assert!(written.insert(key), "{key:?} is written twice");
                    let seen = seen_until.get(&key).copied();
                    until = seen.into_iter().chain(until).min();
                }
            }
            if op.effect == Effect::Delete && until.is_none() {
                spare.push(op.invoked);
            }
            // A write that may never have happened and that nobody has seen: as well it did not.
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
        let deletions = placed.iter().filter(|op| *op.effect == Effect::Delete);
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
                    Effect::Set(fields) => {
                        let state = self.state.get_or_insert_default();
                        for (field, value) in keys(fields) {
                            state[field] = value;
                        }
                    }
                    Effect::Delete => self.state = None,
                    Effect::Get(_) => {}
                }
                self.happens(write, &mut step);
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
            self.happens(*read, &mut step);
            next = self.next();
        }
        let soonest = next.iter().map(|op| self.ops[*op].until).min();
        let ahead = (self.first_left..self.ops.len())
            .take_while(|op| Some(self.ops[*op].invoked) <= soonest)
            .filter(|op| self.happened[*op])
            .collect();
        let key = (self.first_left, ahead, self.spare_happened, self.state);
        if self.tried.insert(key) {
            let waiting = next.iter().filter(|op| self.wants_less(**op));
            let waiting = waiting.map(|op| self.ops[*op].until).min();
            next.retain(|op| self.may_write(*op));
            let mut choices: Vec<_> = next
                .into_iter()
                .map(|op| (self.ops[op].until, Choice::Op(op)))
                .collect();
            if self.may_spare(soonest) {
                choices.push((waiting.unwrap_or(u64::MAX), Choice::Spare));
            }
            // The last is taken first: what must have happened soonest.
            choices.sort_by_key(|(until, _)| std::cmp::Reverse(*until));
            step.choices = choices.into_iter().map(|(_, choice)| choice).collect();
        }
        step
    }

    /// Whether this is a read that finds less than there is, which only a deletion can bring about.
    fn wants_less(&self, op: usize) -> bool {
        let (Effect::Get(found), Some(values)) = (self.ops[op].effect, self.state) else {
            return false;
        };
        found.is_none_or(|found| (0..FIELDS.len()).any(|at| found[at] == 0 && values[at] != 0))
    }

    /// Whether a deletion that nothing demands may be next, and is of use: what is left finds less
    /// than there is.
    fn may_spare(&self, soonest: Option<u64>) -> bool {
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

    /// Whether nothing that is there is still to be read.
    fn may_delete(&self) -> bool {
        let values = self.state.unwrap_or_default();
        !(0..FIELDS.len()).any(|field| values[field] != 0 && self.is_wanted(field, values[field]))
    }

    /// What can be next: all that has begun before anything that is left must have happened.
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
        matches!(self.ops[op].effect, Effect::Get(found) if *found == self.state)
    }

    /// Whether this is a write, and overwrites nothing that is still to be read and does not come
    /// back.
    fn may_write(&self, op: usize) -> bool {
        let fields = match self.ops[op].effect {
            Effect::Set(fields) => fields,
            Effect::Delete => return self.may_delete(),
            Effect::Get(_) => return false,
        };
        // What was never set, and no record at all, come back with a deletion.
        let comes_back = self.deletions_left > 0 || self.spare_happened < self.spare.len();
        let values = self.state.unwrap_or_default();
        let absent_wanted = self.state.is_none() && self.absent_wanted > 0;
        let lost = |(field, _)| {
            let value: i64 = values[field];
            (value != 0 || !comes_back) && self.is_wanted(field, value)
        };
        (comes_back || !absent_wanted) && !keys(fields).any(lost)
    }

    fn happens(&mut self, op: usize, step: &mut Step) {
        self.count(op, |reads| *reads -= 1);
        self.deletions_left -= usize::from(*self.ops[op].effect == Effect::Delete);
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
            self.deletions_left += usize::from(*self.ops[op].effect == Effect::Delete);
            self.happened[op] = false;
            self.left += 1;
            self.first_left = self.first_left.min(op);
        }
        self.spare_happened -= usize::from(step.spare);
        self.state = step.before;
    }

    fn count(&mut self, op: usize, change: impl Fn(&mut usize)) {
        match self.ops[op].effect {
            Effect::Set(_) | Effect::Delete => {}
            Effect::Get(None) => change(&mut self.absent_wanted),
            Effect::Get(Some(values)) => {
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
    let mut ends: Vec<u64> = ops.iter().filter_map(|op| op.returned).collect();
    ends.sort_unstable();
    let at = ends.partition_point(|end| linearizable(&until(ops, *end)));
    let mut shortest_history = ends.get(at).map_or(ops.to_vec(), |end| until(ops, *end));
    shortest_history.sort_by_key(|op| op.invoked);
    let mut share = shortest_history.len().div_ceil(2);
    while share > 0 {
        let (mut from, before) = (0, shortest_history.len());
        while from < shortest_history.len() {
            let fewer = without(&shortest_history, from, from + share);
            match fewer.len() < shortest_history.len() && !linearizable(&fewer) {
                true => shortest_history = fewer,
                false => from += share,
            }
        }
        let again = share == 1 && shortest_history.len() < before;
        share = if again { 1 } else { share / 2 };
    }
    shortest_history
}

/// A history without a part of it; but what the rest has seen stays. If the whole makes sense, so
/// does this: reads change nothing, nor does what is overwritten before it is read. Deletions stay as
/// long as there is a read that finds less than all fields.
fn without(ops: &[Op], from: usize, to: usize) -> Vec<Op> {
    let within = |index: usize| (from..to).contains(&index);
    let mut seen = HashSet::new();
    let mut less_seen = false;
    for (index, op) in ops.iter().enumerate() {
        if let Effect::Get(found) = op.effect
            && !within(index)
        {
            less_seen |= found.is_none_or(|values| values.contains(&0));
            seen.extend(found.into_iter().flatten().enumerate());
        }
    }
    let stays = |(index, op): &(usize, &Op)| match op.effect {
        _ if !within(*index) => true,
        Effect::Set(fields) => keys(&fields).any(|key| seen.contains(&key)),
        Effect::Delete => less_seen,
        Effect::Get(_) => false,
    };
    let rest = ops.iter().enumerate().filter(stays);
    rest.map(|(_, op)| op.clone()).collect()
}

/// A history as it was at some time.
fn until(ops: &[Op], time: u64) -> Vec<Op> {
    let invoked = ops.iter().filter(|op| op.invoked <= time).cloned();
    let known = invoked.filter_map(|mut op| {
        if op.returned.is_some_and(|end| end > time) {
            op.returned = None;
        }
        (op.returned.is_some() || !matches!(op.effect, Effect::Get(_))).then_some(op)
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
            Effect::Set(fields) => {
                write!(f, "sets ")?;
                f.debug_map()
                    .entries(keys(fields).map(|(field, value)| (FIELDS[field], value)))
                    .finish()
            }
            Effect::Delete => write!(f, "deletes"),
            Effect::Get(None) => write!(f, "finds no record"),
            Effect::Get(Some(values)) => write!(f, "finds {values:?}"),
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
