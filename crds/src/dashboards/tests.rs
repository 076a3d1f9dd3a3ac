use std::collections::BTreeSet;

use super::panel::COLUMNS;
use super::*;

fn panels(dashboard: &Dashboard) -> &Vec<Value> {
    dashboard.body["panels"].as_array().unwrap()
}

#[test]
fn no_panel_lies_on_another_or_beyond_the_edge() {
    for dashboard in all() {
        let mut taken = BTreeSet::new();
        for panel in panels(&dashboard) {
            let place = |side: &str| panel["gridPos"][side].as_u64().unwrap();
            assert!(place("x") + place("w") <= u64::from(COLUMNS), "{}", panel["title"]);
            for x in place("x")..place("x") + place("w") {
                for y in place("y")..place("y") + place("h") {
                    assert!(taken.insert((x, y)), "{} in {}", panel["title"], dashboard.file);
                }
            }
        }
    }
}

#[test]
fn gaie_1905_no_panel_asks_for_a_name_that_the_contract_does_not_hold() {
    let contract = include_str!("../../contract/src/metrics.rs");
    for dashboard in all() {
        for target in
            panels(&dashboard).iter().flat_map(|panel| panel["targets"].as_array().unwrap())
        {
            let expression = target["expr"].as_str().unwrap();
            let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            let names: Vec<&str> = words.filter(|word| word.starts_with("plimsoll_")).collect();
            assert!(!names.is_empty(), "{expression}");
            for name in names {
                let family = ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|end| name.strip_suffix(end))
                    .unwrap_or(name);
                assert!(contract.contains(&format!("\"{family}\"")), "{family} in {expression}");
            }
        }
    }
}

#[test]
fn every_variable_that_a_panel_uses_is_declared() {
    for dashboard in all() {
        let text = dashboard.body["panels"].to_string();
        let declared = dashboard.body["templating"]["list"].as_array().unwrap();
        for name in ["namespace", "llmdeployment"] {
            let used = text.contains(&format!("${name}"));
            assert_eq!(
                used,
                declared.iter().any(|variable| variable["name"] == name),
                "{name} in {}",
                dashboard.file
            );
        }
    }
}
