//! The node itself: what the end-to-end story stands on.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Result;
use plimsoll_tests::cluster::{Prometheus, shared_node, wait_until};
use serde_json::json;

const WEB: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: web
    image: localhost/toolbox:1
    imagePullPolicy: Never
    command: [sh, -c, 'echo serving as $(id -u); echo hello > /tmp/index.html; exec httpd -f -p 8080 -h /tmp']
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";

#[test]
fn the_node_comes_up_within_half_a_minute() {
    let Some(node) = shared_node() else { return };
    eprintln!("the node was Ready after {:.1} s", node.ready_after().as_secs_f64());
    assert!(node.ready_after() < Duration::from_secs(30), "{:?}", node.ready_after());
}

#[test]
fn a_pod_runs_logs_and_is_reached_by_its_service_and_its_name() {
    let Some(node) = shared_node() else { return };
    let kubectl = node.kubectl();
    kubectl.apply(WEB).unwrap();
    kubectl.run(&["wait", "--for=condition=Ready", "pod/web", "--timeout=60s"]).unwrap();
    let logs = kubectl.run(&["logs", "web"]).unwrap();
    assert_eq!(logs.trim(), "serving as 65532");

    let service = kubectl.get(&["service", "web"]).unwrap();
    let address = service["spec"]["clusterIP"].as_str().unwrap().to_string();
    let answer = wait_until("the Service answers", Duration::from_secs(20), || {
        node.inside(|| Ok(get(&address).ok().filter(|text| text.ends_with("hello\n"))))
    });
    assert!(answer.is_ok(), "{answer:?}");

    // From a pod, through DNS, back to a pod on the same bridge.
    let url = "http://web.default.svc.cluster.local/index.html";
    let words = ["exec", "web", "--", "curl", "-sS", "--max-time", "5", url];
    let page =
        wait_until("the name resolves", Duration::from_secs(20), || kubectl.run(&words).map(Some));
    assert_eq!(page.unwrap(), "hello\n");
    kubectl.run(&["delete", "pod/web", "service/web", "--grace-period=1"]).unwrap();
}

fn get(address: &str) -> Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&format!("{address}:80").parse()?, Duration::from_secs(2))?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn the_machine_cannot_reach_the_node() {
    let Some(_node) = shared_node() else { return };
    let address = "192.0.2.1:6443".parse().unwrap();
    assert!(TcpStream::connect_timeout(&address, Duration::from_millis(500)).is_err());
}

#[test]
fn prometheus_scrapes_inside_the_node() {
    let Some(node) = shared_node() else { return };
    let targets =
        json!([{"job_name": "self", "static_configs": [{"targets": ["192.0.2.1:9090"]}]}]);
    let prometheus = Prometheus::start(&node, &targets).unwrap();
    let series = prometheus.wait_for("up == 1", Duration::from_secs(20)).unwrap();
    assert_eq!(series[0]["metric"]["job"], "self");
}

#[test]
fn helm_talks_to_the_node() {
    let Some(node) = shared_node() else { return };
    let releases = node.helm(&["list", "--all-namespaces", "--output", "json"]).unwrap();
    assert_eq!(releases.trim(), "[]");
}
