//! The broker's responses to requests, under its current faults.

use async_nats::jetstream::stream::Config;
use gradestore::log::Seq;
use gradestore::log::broker::{BrokerError, InfoSource, RawMessage, Stored, StreamInfo};
use tokio::time::Instant;

use crate::broker::Message;
use crate::world::{Isolated, State};

/// A request that a server has received.
pub struct ServerRequest<'a> {
    pub state: &'a mut State,
    pub node: usize,
    /// The server that received it, if that server is isolated.
    pub isolated: Option<Isolated>,
    /// Whether the broker's clock has jumped since it was sent.
    pub late: bool,
}

impl ServerRequest<'_> {
    /// The error of a request that only the stream's leader serves; `Some(None)` for no answer.
    pub fn leader(&mut self) -> Option<Option<BrokerError>> {
        if self.isolated.is_some() {
            return Some(None);
        }
        let faults = &self.state.broker.faults;
        if faults.no_leader > 0 || faults.short.is_some() {
            let error = BrokerError::NoResponders("no leader".into());
            return Some((!faults.silent).then_some(error));
        }
        if faults.gone > 0 {
            return Some(Some(BrokerError::NoStream));
        }
        None
    }

    pub fn info(&mut self) -> Option<Result<StreamInfo, BrokerError>> {
        let mut info = self.state.broker.info();
        if let Some(isolated) = &self.isolated {
            let leads = isolated.leader_until.is_some_and(|at| Instant::now() < at);
            if let Ok(info) = &mut info {
                (info.first, info.last) = (isolated.first, isolated.last);
                info.source = match leads {
                    true => InfoSource::Leader,
                    false => InfoSource::Follower,
                };
            }
            return Some(info);
        }
        let faults = &self.state.broker.faults;
        if faults.gone > 0 {
            return Some(Err(BrokerError::NoStream));
        }
        if faults.no_leader > 0 {
            if faults.silent {
                return None;
            }
            if self.state.rng.bool() {
                return Some(Err(BrokerError::NoResponders("no leader".into())));
            }
            let follower = |info: &mut StreamInfo| info.source = InfoSource::Follower;
            let _ = info.as_mut().map(follower);
        }
        Some(info)
    }

    pub fn publish(&mut self, message: Message) -> Option<Result<Stored, BrokerError>> {
        let no_leader = || Err(BrokerError::NoResponders("no leader".into()));
        if let Some(isolated) = &self.isolated {
            // An isolated leader accepts the message, but can't store it.
            let leads = isolated.leader_until.is_some_and(|at| Instant::now() < at);
            return (!leads).then(no_leader);
        }
        let faults = &self.state.broker.faults;
        if faults.no_leader > 0 || faults.gone > 0 || faults.short.is_some() {
            return Some(no_leader());
        }
        if faults.no_quorum > 0 {
            self.state.broker.propose(message);
            return None;
        }
        if faults.full > 0 {
            let why = "insufficient resources (code 503, error code 10023)";
            return Some(Err(BrokerError::Rejected(why.into())));
        }
        self.state.publish(message, self.late)
    }

    /// `held` is whether other nodes held data when the request was sent: a request cannot be
    /// recalled.
    pub fn create(
        &mut self,
        config: Config,
        held: bool,
    ) -> Option<Result<StreamInfo, BrokerError>> {
        match self.leader() {
            // Creating the stream is allowed only if no other node holds data of the lost one.
            Some(Some(BrokerError::NoStream)) if held => {
                let node = self.node;
                let what = format!("node {node} creates a stream although others hold data");
                self.state.violate(what);
            }
            None | Some(Some(BrokerError::NoStream)) => {}
            Some(error) => return error.map(Err),
        }
        Some(self.state.broker.create(config))
    }

    pub fn message(&mut self, seq: Seq) -> Option<Result<Option<RawMessage>, BrokerError>> {
        let broker = &self.state.broker;
        if broker.faults.gone > 0 {
            let why = "stream not found (error 10059)";
            return Some(Err(BrokerError::Rejected(why.into())));
        }
        let end = match &self.isolated {
            Some(isolated) => isolated.last,
            None => broker.visible_end(),
        };
        Some(Ok(broker.raw(seq).filter(|_| seq <= end)))
    }
}

impl State {
    /// Stores `message`, or rejects it; `None` for a violation.
    pub fn publish(&mut self, message: Message, late: bool) -> Option<Result<Stored, BrokerError>> {
        let sender = message.sender;
        match self.broker.publish(message, late, &mut self.ledger) {
            Ok(stored) => {
                if let (Ok(_), Some(node)) = (&stored, sender) {
                    let slot = &mut self.nodes[node];
                    let log = slot.process.as_ref().map(|process| &process.log);
                    let is_other = log.is_some_and(|log| self.broker.log() != Some(log));
                    slot.rejected_since = None;
                    slot.unstored_since = None;
                    slot.suspended |= std::mem::take(&mut slot.suspend_when_stored);
                    if is_other {
                        self.violate(format!("node {node} appends to another log"));
                    }
                }
                Some(stored)
            }
            Err(violation) => {
                self.violate(violation);
                None
            }
        }
    }
}
