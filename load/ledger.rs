//! The writes so far, and the values that a node must hold.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use gradestore::grade::FIELDS;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::connection::{Connection, Error, user_id};

const CHECK_CONNECTIONS: usize = 32;
/// The number of missing values that are printed.
const SHOWN_MAX: u64 = 5;

/// The numbers of a user and a field.
pub(crate) type Key = (u64, usize);

/// The writes of one field, which follow each other.
#[derive(Debug, Default, Clone)]
struct Written {
    answered: Option<i64>,
    /// Sent without a response: each may be stored, now or later, or never.
    unknown: Vec<i64>,
}

/// All writes, except those that were rejected.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    written: HashMap<Key, Written>,
    answered: u64,
}

impl Ledger {
    /// `value` was acknowledged.
    pub(crate) fn answered(&mut self, key: Key, value: i64) {
        self.answered += 1;
        self.written.entry(key).or_default().answered = Some(value);
    }

    /// `value` was sent, and its outcome is unknown.
    pub(crate) fn unknown(&mut self, key: Key, value: i64) {
        self.written.entry(key).or_default().unknown.push(value);
    }

    /// The values that every node must hold.
    pub(crate) fn due(&self) -> Due {
        let mut by_user: HashMap<u64, Vec<(usize, Written)>> = HashMap::new();
        for ((user, field), written) in &self.written {
            // Without an acknowledgement there is no required value.
            if written.answered.is_some() {
                let fields = by_user.entry(*user).or_default();
                fields.push((*field, written.clone()));
            }
        }
        Due {
            users: by_user.into_iter().collect(),
            answered: self.answered,
        }
    }
}

/// A value that a node must hold.
pub(crate) struct Due {
    users: Vec<(u64, Vec<(usize, Written)>)>,
    answered: u64,
}

/// The result for one node.
#[derive(Default)]
struct Found {
    as_set: u64,
    /// Fields that hold a value with an unknown outcome.
    doubtful: u64,
    missing: u64,
    shown: Vec<String>,
}

/// Reads all required values from a node's read port.
pub(crate) async fn check(url: &str, due: Due) -> Result<Value, Error> {
    let Due { users, answered } = due;
    let users = Rc::new(users);
    let found = Rc::new(RefCell::new(Found::default()));
    let mut tasks: JoinSet<Result<(), Error>> = JoinSet::new();
    for first in 0..CHECK_CONNECTIONS {
        let (users, found) = (Rc::clone(&users), Rc::clone(&found));
        let mut connection = Connection::open(url).await?;
        tasks.spawn_local(async move {
            for (user, fields) in users.iter().skip(first).step_by(CHECK_CONNECTIONS) {
                let request = connection.get_request(*user);
                let (status, body) = connection.ask(&request).await?;
                let grade: Value = match status {
                    200 => serde_json::from_slice(body)?,
                    404 => Value::Null,
                    _ => return Err(String::from_utf8_lossy(body).into()),
                };
                found.borrow_mut().compare(*user, fields, &grade);
            }
            Ok(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    let found = found.borrow();
    Ok(json!({
        "what": "check",
        "answered": answered,
        "users": users.len(),
        "doubtful": found.doubtful,
        "as_set": found.as_set,
        "missing": found.missing,
        "shown": found.shown,
    }))
}

impl Found {
    fn compare(&mut self, user: u64, fields: &[(usize, Written)], grade: &Value) {
        for (field, written) in fields {
            let name = FIELDS.get(*field).copied().unwrap_or_default();
            let got = grade.get(name).unwrap_or(&Value::Null);
            let value = got.as_i64();
            if value == written.answered {
                self.as_set += 1;
                continue;
            }
            if value.is_some_and(|value| written.unknown.contains(&value)) {
                self.doubtful += 1;
                continue;
            }
            self.missing += 1;
            if self.missing <= SHOWN_MAX {
                let id = user_id(user);
                self.shown
                    .push(format!("{id} {name}: {written:?}, found {got}"));
            }
        }
    }
}
