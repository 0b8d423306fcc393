//! nats-servers, replicas on them, and proxies in front of both.

pub(crate) mod broker;
pub(crate) mod nats;
pub(crate) mod proxy;
pub(crate) mod seeded;
pub(crate) mod throttle;

pub(crate) use super::node::client;
