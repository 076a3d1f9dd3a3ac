//! `cluster up | down | env`: a node to play with, behind `make cluster` and `make cluster-down`.
//!
//! In: one word. Out: a running node, or none, and how to use it. Never touches the node that tests
//! use: this one has another name.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use plimsoll_tests::cluster::{Lifetime, Node, Tools, toolbox_image};
use plimsoll_tests::install;

const NAME: &str = "play";

fn main() -> ExitCode {
    let word = std::env::args().nth(1).unwrap_or_default();
    let done = match word.as_str() {
        "up" => up(),
        "down" => Node::destroy(NAME),
        "env" => env(),
        _ => Err(anyhow!("say up, down or env")),
    };
    if let Err(error) = done {
        eprintln!("cluster: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn up() -> Result<()> {
    if Node::running(NAME).is_none() {
        let began = Instant::now();
        let tools = Tools::find()?;
        let node = Node::start(NAME, Lifetime::Detached, &[toolbox_image(&tools)?])?;
        eprintln!("the node is Ready after {:.1} s", began.elapsed().as_secs_f32());
        let installed = install::install(&node, &[]);
        // A node is of use without the chart too: to see why it did not come up.
        node.leave();
        installed?;
    }
    env()
}

fn env() -> Result<()> {
    let Some(folder) = Node::running(NAME) else { bail!("no node runs; start one with up") };
    let folder = folder.display();
    println!("export KUBECONFIG={folder}/admin.kubeconfig");
    println!("export PATH={folder}/bin:$PATH");
    eprintln!(
        "kubectl and helm in {folder}/bin enter the node's network by themselves;\n\
         `inside COMMAND` runs anything there, for instance: inside curl http://SERVICE-ADDRESS/"
    );
    Ok(())
}
