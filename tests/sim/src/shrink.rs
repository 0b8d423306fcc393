//! Shortens a failing plan: removes events that are not needed for the failure.

use crate::plan::Plan;
use crate::run::run;

/// The maximum number of runs.
const RUNS_MAX: usize = 400;

/// The shortest plan found that still fails.
pub fn shrink(plan: &Plan) -> Plan {
    let mut best = plan.clone();
    let mut runs = 0;
    let mut fails = |plan: &Plan| {
        runs += 1;
        runs <= RUNS_MAX && run(plan, false).violation.is_some()
    };
    loop {
        let before = best.size();
        shorten(&mut best, &mut fails, |plan| &mut plan.faults);
        for client in 0..best.clients.len() {
            shorten(&mut best, &mut fails, |plan| &mut plan.clients[client]);
        }
        if best.size() == before {
            return best;
        }
    }
}

/// Removes parts of one list, large ones first.
fn shorten<T>(
    best: &mut Plan,
    fails: &mut impl FnMut(&Plan) -> bool,
    list: impl Fn(&mut Plan) -> &mut Vec<T>,
) {
    let mut part = list(best).len();
    while part > 0 {
        let mut at = 0;
        while at < list(best).len() {
            let mut shorter = best.clone();
            let events = list(&mut shorter);
            let end = (at + part).min(events.len());
            events.drain(at..end);
            match fails(&shorter) {
                true => *best = shorter,
                false => at += part,
            }
        }
        part /= 2;
    }
}
