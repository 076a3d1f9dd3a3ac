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

/// A running Prometheus; it ends with the value.
pub struct Prometheus<'node> {
    node: &'node Node,
    daemon: Daemon,
}

impl<'node> Prometheus<'node> {
    /// Starts it with the given `scrape_configs`, scraping every second.
    pub fn start(node: &'node Node, scrape_configs: &Value) -> Result<Prometheus<'node>> {
        let folder = node.folder().join("prometheus");
        std::fs::create_dir_all(&folder)?;
        let config = json!({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": scrape_configs,
        });
        let file = folder.join("prometheus.yml");
        std::fs::write(&file, serde_yaml_ng::to_string(&config)?)?;
        let words = [
            node.tools().prometheus.display().to_string(),
            format!("--config.file={}", file.display()),
            format!("--storage.tsdb.path={}", folder.join("data").display()),
            format!("--web.listen-address={NODE_ADDRESS}:{PORT}"),
        ];
        let mut daemon = node.daemon("prometheus", &words)?;
        wait_until("Prometheus is ready", Duration::from_secs(30), || {
            daemon.check()?;
            let url = format!("http://{NODE_ADDRESS}:{PORT}/-/ready");
            let answer = node.command(&["curl", "-sf", "-o", "/dev/null", &url]).status()?;
            Ok(answer.success().then_some(()))
        })?;
        Ok(Prometheus { node, daemon })
    }

    /// Where it answers, inside the node.
    pub fn url(&self) -> String {
        format!("http://{NODE_ADDRESS}:{PORT}")
    }

    /// The series an instant query brings.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let url = format!("{}/api/v1/query", self.url());
        let query = format!("query={expression}");
        let words = ["curl", "-sS", "--get", "--data-urlencode", &query, &url];
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
