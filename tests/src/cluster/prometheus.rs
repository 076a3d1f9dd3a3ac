//! A real Prometheus on a node, for tests that look at metrics as users do.
//!
//! In: a scrape configuration. Out: answers to queries. Never kept: its data dies with the node.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::node::Node;
use super::process::{Daemon, wait_until};
use super::sandbox::NODE_ADDRESS;

const PORT: u16 = 9090;
const PORT_TLS: u16 = 9443;

/// Where [`Prometheus::start_with_tls`] answers, for pods that trust the cluster's authority.
pub const PROMETHEUS_TLS: &str = "https://192.0.2.1:9443";

/// A running Prometheus; it ends with the value.
pub struct Prometheus<'node> {
    node: &'node Node,
    daemon: Daemon,
    url: String,
}

impl<'node> Prometheus<'node> {
    /// Starts it with the given `scrape_configs`, scraping every second.
    pub fn start(node: &'node Node, scrape_configs: &Value) -> Result<Prometheus<'node>> {
        let url = format!("http://{NODE_ADDRESS}:{PORT}");
        Prometheus::launch(node, "prometheus", PORT, url, scrape_configs, &[])
    }

    /// The same behind TLS, with a certificate of the cluster's authority.
    pub fn start_with_tls(node: &'node Node, scrape_configs: &Value) -> Result<Prometheus<'node>> {
        let identity = node.serving_certificate("prometheus")?;
        let file = node.folder().join("prometheus-web.yml");
        let web = json!({"tls_server_config":
            {"cert_file": identity.certificate, "key_file": identity.key}});
        std::fs::write(&file, serde_yaml_ng::to_string(&web)?)?;
        let flag = format!("--web.config.file={}", file.display());
        let url = PROMETHEUS_TLS.to_owned();
        Prometheus::launch(node, "prometheus-tls", PORT_TLS, url, scrape_configs, &[flag])
    }

    fn launch(
        node: &'node Node,
        name: &str,
        port: u16,
        url: String,
        scrape_configs: &Value,
        more: &[String],
    ) -> Result<Prometheus<'node>> {
        let folder = node.folder().join(name);
        std::fs::create_dir_all(&folder)?;
        let config = json!({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": scrape_configs,
        });
        let file = folder.join("prometheus.yml");
        std::fs::write(&file, serde_yaml_ng::to_string(&config)?)?;
        let mut words = vec![
            node.tools().prometheus.display().to_string(),
            format!("--config.file={}", file.display()),
            format!("--storage.tsdb.path={}", folder.join("data").display()),
            format!("--web.listen-address={NODE_ADDRESS}:{port}"),
        ];
        words.extend_from_slice(more);
        let mut daemon = node.daemon(name, &words)?;
        let ready = format!("{url}/-/ready");
        wait_until("Prometheus is ready", Duration::from_secs(30), || {
            daemon.check()?;
            let words = ["curl", "-skf", "-o", "/dev/null", &ready];
            Ok(node.command(&words).status()?.success().then_some(()))
        })?;
        Ok(Prometheus { node, daemon, url })
    }

    /// Where it answers, inside the node.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The series an instant query brings.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let url = format!("{}/api/v1/query", self.url());
        let query = format!("query={expression}");
        let words = ["curl", "-skS", "--get", "--data-urlencode", &query, &url];
        let output = self.node.command(&words).output()?;
        let answer: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("no JSON: {}", String::from_utf8_lossy(&output.stdout)))?;
        let series = answer.pointer("/data/result").and_then(Value::as_array);
        series.cloned().with_context(|| format!("{answer}"))
    }

    /// Waits until a query brings at least one series.
    pub fn wait_for(&self, expression: &str, timeout: Duration) -> Result<Vec<Value>> {
        wait_until(&format!("Prometheus knows {expression}"), timeout, || {
            let series = self.query(expression)?;
            Ok((!series.is_empty()).then_some(series))
        })
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        self.daemon.stop();
    }
}
