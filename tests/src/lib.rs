//! Real parts for tests: a Kubernetes of our own, and the clients and servers that stories need.
//!
//! Nothing here is simulated except what `README.md` names. Nothing here reaches a network outside
//! loopback and the namespaces it makes itself.

pub mod cluster;
pub mod facts;
pub mod http;
pub mod hub;
pub mod install;
pub mod load;
pub mod over;
pub mod stage;
pub mod traffic;
