//! The engine as a sidecar: `examples/sidecar.yaml` as it stands, with no operator anywhere.

use std::process::Stdio;
use std::time::{Duration, Instant};

use plimsoll_tests::cluster::{Tools, shared_node, toolbox_image, wait_until};
use plimsoll_tests::install;
use plimsoll_tests::stage::Stage;
use serde_json::Value;

const ANSWER: &str = "Mara Tollard";

/// What the model said, from every line that is an OpenAI answer.
fn contents(lines: &str) -> Vec<String> {
    let answers = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    answers
        .filter_map(|answer| {
            Some(answer.pointer("/choices/0/message/content")?.as_str()?.to_string())
        })
        .collect()
}

#[test]
fn a_sidecar_is_ready_before_its_application_and_answers_until_it_has_ended() {
    let Some(node) = shared_node() else { return };
    install::import_engine(&node).unwrap();
    let tools = Tools::find().unwrap();
    let curl = toolbox_image(&tools).unwrap().renamed("docker.io/curlimages/curl:8.16.0");
    node.import(&curl).unwrap();
    let stage = Stage::new(&node, "sidecar").unwrap();
    stage.claim_with("models", "plim", &install::root().join("tests/model")).unwrap();
    let example = install::root().join("examples/sidecar.yaml");
    stage.apply(&std::fs::read_to_string(example).unwrap()).unwrap();
    let ready = ["wait", "--for=condition=Available", "deployment/storyteller", "--timeout=90s"];
    stage.run(&ready).unwrap();

    // The application asked once, with nothing but the order of starts to rely on.
    let words = ["logs", "deployment/storyteller", "--container=application"];
    let first = wait_until("the application was answered", Duration::from_secs(30), || {
        let said = contents(&stage.run(&words)?);
        Ok((!said.is_empty()).then_some(said))
    });
    assert!(first.unwrap()[0].contains(ANSWER));
    let pods = stage.get(&["pods", "--selector=app=storyteller"]).unwrap();
    let pod = &pods["items"][0];
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0, "{pod:#}");

    // On its way out it asks again; the engine must still be there.
    let follow = [&["--namespace", stage.namespace][..], &words, &["--follow"]].concat();
    let follower = node.kubectl().command(&follow).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    stage.run(&["delete", "deployment", "storyteller"]).unwrap();
    let name = format!("pod/{}", pod["metadata"]["name"].as_str().unwrap());
    stage.run(&["wait", "--for=delete", &name, "--timeout=60s"]).unwrap();
    let output = follower.wait_with_output().unwrap();
    let said = contents(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[1].contains(ANSWER), "{said:?}");
    // It drained and ended by itself: the grace of 60 s was not used up.
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
}
