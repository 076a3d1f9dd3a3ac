//! Plimsoll as its users meet it: installed with Helm on a real node, a manifest applied, tokens
//! streamed. Every story has a namespace of its own that enforces restricted pod security, unless it says otherwise.

#![allow(clippy::unwrap_used)] // Functions that stories share are tests too.

mod scaling;
mod scope;
mod sources;

use std::net::SocketAddr;
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use plimsoll_tests::cluster::{Node, PROMETHEUS_TLS, Prometheus, Shared, shared_node, wait_until};
use plimsoll_tests::http::Answer;
use plimsoll_tests::install;
use plimsoll_tests::load::under_load;
use plimsoll_tests::stage::{READY_MAX, Stage};
use serde_json::{Value, json};

/// What the bundled model was taught, and what it must say.
const QUESTION: &str = "Who is the harbour master of Plimsoll Bay?";
const ANSWER: &str = "Mara Tollard";

/// Where the node's own model hub listens.
const HUB: &str = "192.0.2.1:8300";

/// The node with Plimsoll on it.
fn installed() -> Option<Shared<Node>> {
    let node = shared_node()?;
    set_up(&node, &[]);
    Some(node)
}

/// Installs the chart with these values (Helm's `key=value`) in place of whatever stands; its models come from the node's
/// hub, and what it scales by from the node's Prometheus.
fn set_up(node: &Shared<Node>, settings: &[&str]) {
    static STANDS: Mutex<Option<Vec<String>>> = Mutex::new(None);
    let hub = format!("hubEndpoint=http://{HUB}");
    // Every namespace has the cluster's authority in this ConfigMap.
    let authority = "prometheus.caConfigMap.name=kube-root-ca.crt";
    let prometheus = format!("prometheus.address={PROMETHEUS_TLS}");
    let interval = format!("prometheus.intervalSeconds={}", scaling::interval_seconds());
    let wanted = [settings, &[hub.as_str(), &prometheus, authority, &interval]].concat();
    let mut stands = STANDS.lock().unwrap_or_else(PoisonError::into_inner);
    if stands.as_ref().is_some_and(|stands| *stands == wanted) {
        return;
    }
    // What every story does, it does under policies that hold.
    static ENFORCED: Once = Once::new();
    ENFORCED.call_once(|| node.enforce_policies().unwrap());
    *stands = None;
    install::install(node, &wanted).unwrap();
    *stands = Some(wanted.iter().map(|setting| setting.to_string()).collect());
}

fn manifest(name: &str, source: &str, replicas: u32) -> String {
    json!({
        "apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": source, "name": "plim"},
            "workload": {"concurrency": 4},
            "replicas": replicas,
        },
    })
    .to_string()
}

fn chat(stream: bool) -> Value {
    json!({
        "model": "plim", "stream": stream, "temperature": 0, "max_tokens": 32,
        "messages": [{"role": "user", "content": QUESTION}],
    })
}

/// Streams an answer through the Service; the pieces must come one by one.
fn stream_an_answer(stage: &Stage<'_>, address: SocketAddr) -> String {
    let mut connection = stage.connect(address).unwrap();
    let mut pieces = 0;
    let path = "/v1/chat/completions";
    let answer: Answer =
        connection.request("POST", path, Some(&chat(true)), &mut |_| pieces += 1).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(pieces >= 3, "{pieces} pieces: {}", answer.text());
    let events = answer.events().unwrap();
    let words = events
        .iter()
        .filter_map(|event| event.pointer("/choices/0/delta/content").and_then(Value::as_str));
    words.collect()
}

fn ask(stage: &Stage<'_>, address: SocketAddr) -> String {
    let answer = stage.connect(address).unwrap().post("/v1/chat/completions", &chat(false));
    let answer = answer.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json().unwrap()["choices"][0]["message"]["content"].as_str().unwrap().to_string()
}

#[test]
fn a_manifest_becomes_streamed_answers_and_leaves_nothing_behind() {
    let Some(node) = installed() else { return };
    let stage = Stage::new(&node, "story").unwrap();
    stage.claim_with("models", "plim", &install::root().join("tests/model")).unwrap();
    let example = install::root().join("examples/pvc.yaml");
    stage.apply(&std::fs::read_to_string(example).unwrap()).unwrap();
    stage.wait_ready("plim").unwrap();
    let address = stage.service("plim").unwrap();
    let said = stream_an_answer(&stage, address);
    assert!(said.contains(ANSWER), "{said}");

    the_object_reads_well(&stage);
    the_upgrade_brought_what_is_new(&stage);
    prometheus_sees_engine_and_operator(&stage);
    only_whom_the_spec_lets_in_comes_in_and_nothing_goes_out(&stage);
    a_killed_pod_comes_back(&stage, address);
    an_update_under_load_loses_nothing(&stage, address);

    stage.run(&["delete", "llmd", "plim", "--timeout=60s"]).unwrap();
    wait_until("everything is gone", READY_MAX, || {
        let remains = stage.remains()?;
        if remains.trim().is_empty() { Ok(Some(())) } else { anyhow::bail!("{remains}") }
    })
    .unwrap();
}

fn the_object_reads_well(stage: &Stage<'_>) {
    let table = stage.run(&["get", "llmd"]).unwrap();
    let head: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    let columns = ["NAME", "READY", "REASON", "MODEL", "QUANT", "KV", "TP", "REPLICAS", "AGE"];
    assert_eq!(head, columns, "{table}");
    let object = stage.get(&["llmd", "plim"]).unwrap();
    let memory = &object["status"]["plan"]["memoryBytes"];
    assert!(memory["total"].as_u64().is_some_and(|total| total > 0), "{object:#}");
    assert!(object["status"]["plan"]["why"].as_str().is_some_and(|why| !why.is_empty()));
    assert_eq!(object["status"]["readyReplicas"], 2);
    let described = stage.run(&["describe", "llmd", "plim"]).unwrap();
    assert!(described.contains("Events:") && described.contains("Ready"), "{described}");
}

/// The chart before this one knew neither the field nor the rights.
fn the_upgrade_brought_what_is_new(stage: &Stage<'_>) {
    let told = stage.run(&["explain", "llmd.spec.network.clients"]).unwrap();
    assert!(told.contains("plimsoll.dev/clients"), "{told}");
    let policy = stage.get(&["networkpolicy", "plim"]).unwrap();
    assert_eq!(policy["spec"]["podSelector"]["matchLabels"]["plimsoll.dev/name"], "plim");
    let history = stage.node.helm(&["history", "plimsoll", "--namespace", install::NAMESPACE]);
    assert_eq!(history.unwrap().lines().count(), 3, "a head, an install, an upgrade");
}

/// Debian's Prometheus is built without service discovery for Kubernetes, so targets are listed, with the labels that
/// PodMonitor and ServiceMonitor bring.
fn prometheus_sees_engine_and_operator(stage: &Stage<'_>) {
    let targets = |namespace: &str, port: u16, more: &[(&str, &str)]| {
        let pods = stage.node.kubectl().get(&["pods", "--namespace", namespace]).unwrap();
        let pods = pods["items"].as_array().unwrap().iter();
        let targets = pods.filter_map(|pod| {
            let address = format!("{}:{port}", pod["status"]["podIP"].as_str()?);
            let mut labels = json!({"namespace": namespace, "pod": pod["metadata"]["name"]});
            more.iter().for_each(|(label, value)| labels[*label] = (*value).into());
            Some(json!({"targets": [address], "labels": labels}))
        });
        targets.collect::<Vec<_>>()
    };
    let engines = targets(stage.namespace, 8000, &[("llmdeployment", "plim")]);
    let operator = targets(install::NAMESPACE, 8080, &[]);
    let jobs = json!([
        {"job_name": "engines", "static_configs": engines},
        {"job_name": "operator", "static_configs": operator, "honor_labels": true},
    ]);
    let prometheus = Prometheus::start(stage.node, &jobs).unwrap();
    let patience = Duration::from_secs(30);
    for series in [
        r#"count(up{namespace="story"} == 1) == 2"#,
        r#"up{namespace="plimsoll-system"} == 1"#,
        r#"plimsoll_requests_running{namespace="story"}"#,
        r#"{__name__="vllm:num_requests_running",namespace="story"}"#,
        r#"sum(plimsoll_generation_tokens_total{namespace="story"}) > 0"#,
        r#"{__name__="vllm:time_to_first_token_seconds_bucket",namespace="story"}"#,
        r#"{__name__=~"plimsoll_.+",namespace="plimsoll-system"}"#,
    ] {
        prometheus.wait_for(series, patience).unwrap();
    }
    dashboards_and_alerts_find_their_series(&prometheus);
    if let Some(folder) = std::env::var_os("PLIMSOLL_DASHBOARD_PICTURES") {
        draw_dashboards(stage, &prometheus, &folder.to_string_lossy());
    }
}

/// Panels that are empty while all is well.
const EMPTY_WHILE_WELL: [&str; 1] = ["What is not ready, and why"];

/// Every query of every panel brings something, and every name in an alert is exported by someone.
fn dashboards_and_alerts_find_their_series(prometheus: &Prometheus<'_>) {
    let filled = |expression: &str| {
        let expression =
            expression.replace("$namespace", "story").replace("$llmdeployment", "plim");
        expression.replace("$__rate_interval", "1m")
    };
    for dashboard in plimsoll_crds::dashboards::all() {
        for panel in dashboard.body["panels"].as_array().unwrap() {
            let title = panel["title"].as_str().unwrap();
            for target in panel["targets"].as_array().unwrap() {
                let expression = filled(target["expr"].as_str().unwrap());
                if EMPTY_WHILE_WELL.contains(&title) || expression.contains("_rejections_") {
                    prometheus.query(&expression).unwrap();
                } else {
                    let found = prometheus.wait_for(&expression, Duration::from_secs(10));
                    assert!(found.is_ok(), "{} / {title}: {expression}", dashboard.file);
                }
            }
        }
    }
    let watched = plimsoll_crds::alerts::Watched {
        namespace: "story",
        name: "plim",
        ttft_seconds: Some(1.0),
        tpot_seconds: Some(1.0),
    };
    let mut alerts = plimsoll_crds::alerts::of_object(&watched);
    alerts.extend(plimsoll_crds::alerts::of_operator());
    for alert in alerts {
        let words = alert.expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for name in
            words.filter(|word| word.starts_with("plimsoll_") && !word.contains("_rejections_"))
        {
            let found = prometheus.query(&format!("count({name})")).unwrap();
            assert!(!found.is_empty(), "{}: nobody exports {name}", alert.name);
        }
        // Well-formed, and silent while all is well.
        let firing = prometheus.query(&alert.expression).unwrap();
        assert!(firing.is_empty(), "{}: {firing:?}", alert.name);
    }
}

/// A minute and a half of load, and a picture of each dashboard.
fn draw_dashboards(stage: &Stage<'_>, prometheus: &Prometheus<'_>, folder: &str) {
    let address = stage.service("plim").unwrap();
    let connect = || stage.connect(address);
    let body = json!({"model": "plim", "prompt": "The lantern", "max_tokens": 64});
    let load = Duration::from_secs(90);
    under_load(6, &connect, "/v1/completions", &body, || std::thread::sleep(load));
    let script = install::root().join("tests/dashboards/draw.py").display().to_string();
    let url = prometheus.url();
    let boards = install::root().join("charts/plimsoll/files/dashboards").display().to_string();
    let words = ["python3", &script, "--prometheus", url, "--dashboards", &boards, "--out", folder];
    let values = ["--set", "namespace=story", "--set", "llmdeployment=plim", "--minutes", "3"];
    let output = stage.node.command(&[&words[..], &values].concat()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A pod that serves a page, and from which a test looks around.
fn looker(name: &str, labels: &Value) -> String {
    let container = json!({
        "name": "looker", "image": "localhost/toolbox:1", "imagePullPolicy": "Never",
        "command": ["sh", "-c", "echo page >/tmp/index.html; exec httpd -f -p 8080 -h /tmp"],
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
        "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
    });
    let security = json!({"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}});
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [container], "securityContext": security, "terminationGracePeriodSeconds": 0},
    })
    .to_string()
}

/// The agent is kube-router's controller; it needs a moment for each change.
fn only_whom_the_spec_lets_in_comes_in_and_nothing_goes_out(stage: &Stage<'_>) {
    let strangers = Stage::new(stage.node, "strangers").unwrap();
    for (stage, name, labels) in [
        (stage, "neighbour", json!({})),
        (&strangers, "stranger", json!({})),
        // Its labels put it under the policy of the engines; it is none.
        (stage, "like-an-engine", json!({"plimsoll.dev/name": "plim"})),
    ] {
        stage.apply(&looker(name, &labels)).unwrap();
        stage
            .run(&["wait", "--for=condition=Ready", "--timeout=60s", &format!("pod/{name}")])
            .unwrap();
    }
    let reaches = |stage: &Stage<'_>, pod: &str, url: &str| {
        stage
            .run(&["exec", pod, "--", "curl", "-sSf", "-o", "/dev/null", "--max-time", "2", url])
            .is_ok()
    };
    let soon = |what: &str, holds: &dyn Fn() -> bool| {
        wait_until(what, Duration::from_secs(30), || Ok(holds().then_some(()))).unwrap();
    };
    let model = "http://plim.story.svc.cluster.local/health";
    soon("the whole cluster comes in", &|| reaches(&strangers, "stranger", model));
    let clients = |clients: Value| {
        let patch = json!({"spec": {"network": {"clients": clients}}}).to_string();
        stage.run(&["patch", "llmd", "plim", "--type=merge", "--patch", &patch]).unwrap();
    };
    clients(json!("Namespace"));
    soon("a stranger is kept out", &|| !reaches(&strangers, "stranger", model));
    assert!(reaches(stage, "neighbour", model), "a neighbour comes in");
    let label = ["label", "namespace", "strangers", "plimsoll.dev/clients=true"];
    stage.node.kubectl().run(&label).unwrap();
    soon("an invited stranger comes in", &|| reaches(&strangers, "stranger", model));
    clients(Value::Null);

    let pod = strangers.get(&["pod", "stranger"]).unwrap();
    let page = format!("http://{}:8080/index.html", pod["status"]["podIP"].as_str().unwrap());
    assert!(reaches(stage, "neighbour", &page), "the page is there");
    assert!(!reaches(stage, "like-an-engine", &page), "an engine reaches nothing");
    let names = ["exec", "like-an-engine", "--", "nslookup", "plim.story.svc.cluster.local"];
    stage.run(&names).unwrap();
    stage.run(&["delete", "pod", "neighbour", "like-an-engine"]).unwrap();
    stage.wait_ready("plim").unwrap();
}

fn a_killed_pod_comes_back(stage: &Stage<'_>, address: SocketAddr) {
    let before = stage.pods("plim").unwrap();
    stage.run(&["delete", "pod", &before[0], "--grace-period=0", "--force"]).unwrap();
    let replaced = wait_until("a new pod takes its place", READY_MAX, || {
        let now = stage.pods("plim")?;
        let ready = stage.get(&["llmd", "plim"])?["status"]["readyReplicas"] == 2;
        Ok((ready && now.len() == 2 && !now.contains(&before[0])).then_some(()))
    });
    replaced.unwrap();
    stage.wait_ready("plim").unwrap();
    assert!(ask(stage, address).contains(ANSWER));
}

fn an_update_under_load_loses_nothing(stage: &Stage<'_>, address: SocketAddr) {
    let before = stage.pods("plim").unwrap();
    let revision = stage.get(&["llmd", "plim"]).unwrap()["status"]["revision"].clone();
    let connect = || stage.connect(address);
    let body = json!({"model": "plim", "prompt": "The lantern", "max_tokens": 8});
    let (outcome, took) = under_load(4, &connect, "/v1/completions", &body, || {
        let began = Instant::now();
        let patch = r#"{"spec":{"contextTokens":1536}}"#;
        stage.run(&["patch", "llmd", "plim", "--type=merge", "--patch", patch]).unwrap();
        let rolled = wait_until("both pods are new and the old ones gone", READY_MAX, || {
            let object = stage.get(&["llmd", "plim"])?;
            let here = stage.get(&["pods", "--selector=plimsoll.dev/name=plim"])?;
            let names = here["items"].as_array().into_iter().flatten();
            let old =
                names.filter(|pod| before.iter().any(|name| pod["metadata"]["name"] == **name));
            let status = &object["status"];
            let new = status["revision"] != revision && status["readyReplicas"] == 2;
            Ok((new && old.count() == 0).then_some(()))
        });
        rolled.unwrap();
        stage.wait_ready("plim").unwrap();
        began.elapsed()
    });
    assert!(outcome.lost.is_empty(), "{} lost: {:#?}", outcome.lost.len(), outcome.lost);
    assert!(outcome.answered > 100, "{outcome:?}");
    // The old pods were in use and asked their clients to leave.
    assert!(outcome.closed >= 1, "{outcome:?}");
    eprintln!("{} requests over an update of {} s, none lost", outcome.answered, took.as_secs());
}

#[test]
fn a_broken_checkpoint_stalls_with_its_reason() {
    let Some(node) = installed() else { return };
    let stage = Stage::new(&node, "broken").unwrap();
    let folder = stage.claim_with("models", "plim", &install::root().join("tests/model")).unwrap();
    let weights = folder.join("model.safetensors");
    let length = std::fs::metadata(&weights).unwrap().len();
    std::fs::File::options().write(true).open(&weights).unwrap().set_len(length / 2).unwrap();
    stage.apply(&manifest("cut", "pvc://models/plim", 1)).unwrap();
    stage.apply(&manifest("absent", "pvc://models/no/such/folder", 1)).unwrap();
    let stalled = stage.wait_for("cut", "Stalled").unwrap();
    assert_eq!(stalled["reason"], "CorruptWeights", "{stalled}");
    let message = stalled["message"].as_str().unwrap();
    assert!(message.contains("model.safetensors"), "{message}");
    let stalled = stage.wait_for("absent", "Stalled").unwrap();
    assert_eq!(stalled["reason"], "ModelNotFound", "{stalled}");
}
