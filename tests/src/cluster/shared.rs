//! One cluster for all tests of a test binary; of API servers a few, so that tests go on side by side.
//!
//! In: nothing. Out: the node, or an API server, held by one test at a time; or nothing and one
//! clear line where this machine cannot have it. Never silently left out: with
//! `PLIMSOLL_REQUIRE_CLUSTER=1` what cannot run fails.

use std::fs::File;
use std::ops::Deref;
use std::sync::{Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};

use super::api_server::ApiServer;
use super::containers::toolbox_image;
use super::fleet::Fleet;
use super::node::Node;
use super::process::Lifetime;
use super::tools::Tools;

/// The name of the node that tests share; `make cluster` uses another.
const TEST_NODE: &str = "test";

/// API servers of one test binary; 400 MB each.
const API_SERVERS_MAX: usize = 4;

/// Exclusive use of a cluster that outlives the test.
pub struct Shared<T: 'static> {
    cluster: &'static T,
    _turn: Turn,
}

/// What its holder alone has, until it is dropped.
enum Turn {
    Node(#[expect(dead_code, reason = "held, not read")] MutexGuard<'static, ()>),
    Seat(#[expect(dead_code, reason = "held, not read")] Seat),
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.cluster
    }
}

/// The node, brought up by the first test that asks. `None` when this machine cannot run one, which
/// has been said on standard error.
pub fn shared_node() -> Option<Shared<Node>> {
    static TURN: Mutex<()> = Mutex::new(());
    static NODE: OnceLock<Result<Node, String>> = OnceLock::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(reason) = possible() {
        leave_out(&reason);
        return None;
    }
    let node = NODE.get_or_init(|| start_node().map_err(|error| format!("{error:#}")));
    match node {
        Ok(cluster) => Some(Shared { cluster, _turn: Turn::Node(turn) }),
        Err(error) => panic!("the test node did not start: {error}"),
    }
}

/// An API server alone that no other test has now, brought up by the first test that finds none free; `None` as for the
/// node, but root is not needed.
pub fn shared_api_server() -> Option<Shared<ApiServer>> {
    tools()?;
    let mut seat = Seat::take();
    let cluster = *seat.server.get_or_insert_with(|| Box::leak(Box::new(start_api_server())));
    Some(Shared { cluster, _turn: Turn::Seat(seat) })
}

/// What builds clusters. Where it is not installed, that has been said on standard error.
pub fn tools() -> Option<Tools> {
    Tools::find().inspect_err(|error| leave_out(&format!("{error:#}"))).ok()
}

/// A place for one API server, empty until somebody needed it.
struct Seat {
    server: Option<&'static ApiServer>,
}

/// Those that nobody has.
static FREE: Mutex<Vec<Option<&'static ApiServer>>> = Mutex::new(Vec::new());
static GIVEN_BACK: Condvar = Condvar::new();

impl Seat {
    /// Waits while all are taken. One that runs is taken before one that does not.
    fn take() -> Seat {
        static FILLED: Once = Once::new();
        FILLED.call_once(|| free_seats().resize(API_SERVERS_MAX, None));
        let mut free = GIVEN_BACK
            .wait_while(free_seats(), |free| free.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let running = free.iter().position(Option::is_some).unwrap_or(0);
        Seat { server: free.remove(running) }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        free_seats().push(self.server);
        GIVEN_BACK.notify_one();
    }
}

fn free_seats() -> MutexGuard<'static, Vec<Option<&'static ApiServer>>> {
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One at a time, and with other ports where another program took one that was free a moment ago.
fn start_api_server() -> ApiServer {
    static STARTING: Mutex<()> = Mutex::new(());
    let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    let started = ApiServer::start().or_else(|_| ApiServer::start());
    started.unwrap_or_else(|error| panic!("the test API server did not start: {error:#}"))
}

/// A control plane with a fleet of fake nodes, of its own; `None` as for the node.
pub fn shared_fleet(name: &str) -> Option<Fleet> {
    if let Err(reason) = possible() {
        leave_out(&reason);
        return None;
    }
    let started = hold_machine_lock().and_then(|()| Fleet::start(name));
    Some(started.unwrap_or_else(|error| panic!("the fleet did not start: {error:#}")))
}

/// What stands in the way of a node on this machine.
fn possible() -> Result<(), String> {
    // SAFETY: a plain system call without arguments.
    if unsafe { libc::geteuid() } != 0 {
        return Err("they need root".into());
    }
    Tools::find().map(|_| ()).map_err(|error| format!("{error:#}"))
}

fn leave_out(reason: &str) {
    assert!(
        std::env::var("PLIMSOLL_REQUIRE_CLUSTER").is_err(),
        "PLIMSOLL_REQUIRE_CLUSTER is set, but cluster tests cannot run: {reason}"
    );
    eprintln!("cluster tests are left out: {reason}");
}

fn start_node() -> Result<Node> {
    hold_machine_lock()?;
    remove_at_exit();
    let tools = Tools::find()?;
    Node::start(TEST_NODE, Lifetime::Owner, &[toolbox_image(&tools)?])
}

/// Two test runs on one machine take turns: the node's folder and control group have fixed names.
fn hold_machine_lock() -> Result<()> {
    static LOCK: OnceLock<File> = OnceLock::new();
    if LOCK.get().is_some() {
        return Ok(());
    }
    let path = "/var/tmp/plimsoll/test.lock";
    std::fs::create_dir_all("/var/tmp/plimsoll")?;
    let file = File::options().create(true).append(true).open(path).context(path)?;
    if file.try_lock().is_err() {
        eprintln!("another run holds the test node; waiting for {path}");
        file.lock().context(path)?;
    }
    if LOCK.set(file).is_err() {
        bail!("the machine lock is taken once per process");
    }
    Ok(())
}

/// A static is never dropped: what the kernel does not clean up goes when the process exits.
fn remove_at_exit() {
    extern "C" fn remove() {
        Node::destroy(TEST_NODE).ok();
    }
    // SAFETY: the function takes nothing, does not unwind and lives as long as the program.
    unsafe { libc::atexit(remove) };
}
