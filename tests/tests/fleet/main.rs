//! A fleet of objects on a real control plane with fake nodes: how soon children and Ready come, what that costs, and that
//! nothing costs anything at rest. A short run proves that it works at all; `make soak-fleet` takes a thousand objects, as
//! other operators were measured with, one of them in the same run, and leaves the figures in docs/soak.
//!
//! No engine runs. A real one's first measured values are one more write of status for each object.

#![allow(clippy::unwrap_used)] // Functions that stories share are tests too.

mod kubelets;
mod report;
mod story;
mod subjects;
mod usage;
mod watch;

use plimsoll_tests::cluster::shared_fleet;
use serde_json::{Value, json};

use story::Size;

/// Objects, seconds of rest, objects of the trickle, nodes, namespaces.
const SHORT: Size = Size { objects: 40, rest_seconds: 5, trickled: 10, nodes: 5, namespaces: 2 };

fn long(objects: usize) -> Size {
    Size { objects, rest_seconds: 300, trickled: 300, nodes: 50, namespaces: 10 }
}

#[test]
fn a_fleet_gets_its_children_at_once_and_costs_nothing_at_rest_or_at_a_restart() {
    let wanted = std::env::var("PLIMSOLL_SOAK_FLEET").ok();
    let size = wanted
        .as_ref()
        .map_or(SHORT, |objects| long(objects.parse().expect("PLIMSOLL_SOAK_FLEET is a number")));
    let Some(mut fleet) = shared_fleet("fleet") else { return };
    let ours = story::measure(&mut fleet, &subjects::PLIMSOLL, &size, wanted.is_some());
    drop(fleet);
    let mut figures = json!({"setUp": set_up(&size), "plimsoll": ours});
    keep(&figures);
    if wanted.is_some() && std::env::var("PLIMSOLL_LWS").is_ok() {
        let mut fleet = shared_fleet("fleet").unwrap();
        let theirs = story::measure(&mut fleet, &subjects::LEADER_WORKER_SET, &size, true);
        figures["leaderWorkerSet"] = theirs;
        keep(&figures);
    }
    eprintln!("{figures:#}");
    let targets = report::targets(&figures["plimsoll"]).into_iter();
    let bounds = targets.filter_map(|target| {
        let bound = if wanted.is_some() { Some(target.wanted) } else { target.wanted_anywhere };
        Some((bound?, target))
    });
    let missed: Vec<String> = bounds
        .filter(|(bound, target)| !target.keeps_to(*bound))
        .map(|(bound, target)| format!("{}: {}, wanted {bound}", target.name, target.measured))
        .collect();
    assert!(missed.is_empty(), "{missed:#?}");
}

/// Where a long run leaves its figures.
fn keep(figures: &Value) {
    let Ok(folder) = std::env::var("PLIMSOLL_SOAK_RESULTS") else { return };
    std::fs::write(format!("{folder}/fleet.json"), format!("{figures:#}\n")).unwrap();
    std::fs::write(format!("{folder}/fleet.md"), report::markdown(figures)).unwrap();
}

fn set_up(size: &Size) -> Value {
    let cores = std::thread::available_parallelism().unwrap().get();
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let model = processor.lines().find_map(|line| line.strip_prefix("model name\t: "));
    json!({"objects": size.objects, "namespaces": size.namespaces, "nodes": size.nodes,
        "clients": story::CLIENTS, "cores": cores, "processor": model,
        "kubernetes": "1.34.4", "etcd": "3.6.4, no fsync", "kwok": "0.8.0",
        "controllerManager": "20 requests a second for each controller, its default"})
}
