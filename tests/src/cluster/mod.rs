//! A Kubernetes of our own, from Debian's packages and the Go programs beside this crate.
//!
//! In: nothing but the tools that `tests/setup.sh` prepares. Out: [`ApiServer`], etcd and an API
//! server on loopback for anyone, or [`Node`], a whole node in namespaces of its own for root.
//! Never: a process, mount, interface or firewall rule that outlives its owner.

mod api_server;
mod cgroup;
mod containers;
mod control;
mod fleet;
mod image;
mod kubectl;
mod node;
mod pki;
mod process;
mod prometheus;
mod sandbox;
mod shared;
mod tools;

pub use api_server::ApiServer;
pub use containers::toolbox_image;
pub use control::AuditEvent;
pub use fleet::Fleet;
pub use image::Image;
pub use kubectl::Kubectl;
pub use node::{NODE_NAME, Node};
pub use process::{Daemon, Lifetime, wait_until};
pub use prometheus::{PROMETHEUS_TLS, Prometheus};
pub use shared::{Shared, shared_api_server, shared_fleet, shared_node, tools};
pub use tools::Tools;
