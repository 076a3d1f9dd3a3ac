//! In: titles, expressions, widths. Out: Grafana's JSON: panels placed from left to right, row by row, and the frame around
//! them. Never here: what is shown.

use plimsoll_contract::metrics::{Names, operator};
use serde_json::{Value, json};

/// Grafana divides a row into as many columns.
pub const COLUMNS: u32 = 24;
/// The layout of Grafana 10, which later ones read too.
const SCHEMA_VERSION: u32 = 39;

#[derive(Clone, Copy)]
pub enum Kind {
    /// One number, as of now.
    Stat,
    /// Lines over time.
    Lines,
    /// One row per series, as of now.
    Table,
}

pub struct Panel {
    pub title: &'static str,
    pub help: &'static str,
    pub kind: Kind,
    /// Grafana's name of the unit.
    pub unit: &'static str,
    pub width: u32,
    /// Expression and legend.
    pub series: Vec<(String, &'static str)>,
}

pub fn stat(title: &'static str, help: &'static str, expression: String) -> Panel {
    Panel { title, help, kind: Kind::Stat, unit: "short", width: 4, series: vec![(expression, "")] }
}

pub fn table(title: &'static str, help: &'static str, expression: String) -> Panel {
    Panel { kind: Kind::Table, ..stat(title, help, expression) }
}

pub fn lines(title: &'static str, help: &'static str, unit: &'static str) -> Panel {
    Panel { title, help, kind: Kind::Lines, unit, width: COLUMNS / 2, series: Vec::new() }
}

fn grouped(by: &str) -> String {
    if by.is_empty() { "sum".to_owned() } else { format!("sum by ({by})") }
}

/// Per second, of a counter.
pub fn rate(by: &str, selector: &str) -> String {
    format!("{} (rate({selector}[$__rate_interval]))", grouped(by))
}

pub fn quantile(share: f64, by: &str, names: Names, of: &dyn Fn(&str) -> String) -> String {
    let bucket = of(&format!("{}_bucket", names.ours));
    let by = if by.is_empty() { "le".to_owned() } else { format!("le, {by}") };
    format!("histogram_quantile({share}, {})", rate(&by, &bucket))
}

/// Of a histogram.
pub fn mean(by: &str, names: Names, of: &dyn Fn(&str) -> String) -> String {
    let part = |suffix: &str| rate(by, &of(&format!("{}{suffix}", names.ours)));
    format!("{} / {}", part("_sum"), part("_count"))
}

pub fn data_source() -> Value {
    json!({"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"})
}

/// A choice among the values that a label of the conditions has.
pub fn variable(name: &str, title: &str, label: &str, selector: &str, all: bool) -> Value {
    json!({
        "name": name, "label": title, "type": "query", "refresh": 2, "sort": 1,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": format!("label_values({}{selector}, {label})", operator::CONDITION),
        "includeAll": all, "multi": all,
    })
}

pub fn dashboard(uid: &str, title: &str, variables: Value, panels: &[Panel]) -> Value {
    let (mut x, mut y, mut row_height) = (0, 0, 0);
    let mut placed = Vec::new();
    for (index, panel) in panels.iter().enumerate() {
        let height = match panel.kind {
            Kind::Stat => 4,
            Kind::Lines | Kind::Table => 8,
        };
        if x + panel.width > COLUMNS {
            (x, y, row_height) = (0, y + row_height, 0);
        }
        placed
            .push(panel.placed(index + 1, json!({"x": x, "y": y, "w": panel.width, "h": height})));
        x += panel.width;
        row_height = row_height.max(height);
    }
    json!({
        "uid": uid, "title": title, "tags": ["plimsoll"], "schemaVersion": SCHEMA_VERSION,
        "editable": true, "graphTooltip": 1, "refresh": "30s", "timezone": "",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables}, "panels": placed,
    })
}

impl Panel {
    /// One more expression, with its legend.
    pub fn of(mut self, expression: String, legend: &'static str) -> Panel {
        self.series.push((expression, legend));
        self
    }

    pub fn in_unit(self, unit: &'static str) -> Panel {
        Panel { unit, ..self }
    }

    pub fn wide(self, width: u32) -> Panel {
        Panel { width, ..self }
    }

    fn placed(&self, id: usize, place: Value) -> Value {
        let (kind, options) = match self.kind {
            Kind::Stat => ("stat", json!({"colorMode": "value", "graphMode": "area"})),
            Kind::Lines => {
                ("timeseries", json!({"legend": {"displayMode": "list", "placement": "bottom"}}))
            }
            Kind::Table => ("table", json!({})),
        };
        let is_table = matches!(self.kind, Kind::Table);
        let targets = self.series.iter().enumerate().map(|(index, (expression, legend))| {
            json!({
                "refId": char::from(b'A' + u8::try_from(index).expect("a panel has few series")).to_string(),
                "expr": expression, "legendFormat": legend,
                "instant": is_table, "range": !is_table, "format": if is_table { "table" } else { "time_series" },
            })
        });
        let mut body = json!({
            "id": id, "type": kind, "title": self.title, "description": self.help, "gridPos": place,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "targets": targets.collect::<Vec<_>>(),
            "fieldConfig": {"defaults": {"unit": self.unit, "min": 0}, "overrides": []},
            "options": options,
        });
        if is_table {
            let noise = json!({"Time": true, "Value": true});
            body["transformations"] =
                json!([{"id": "organize", "options": {"excludeByName": noise}}]);
        }
        body
    }
}
