//! Prometheus' own promtool evaluates the rules on series written by hand: one case in which each alert fires and no other
//! does, one in which it must not.

use std::process::Command;

use super::*;

const PROMTOOL: &str = "/usr/bin/promtool";

const WATCHED: Watched<'static> = Watched {
    namespace: "team",
    name: "assistant",
    ttft_seconds: Some(0.5),
    tpot_seconds: Some(0.04),
};

/// Series in promtool's notation, one sample a minute; the minutes at which the alert must be silent and must fire.
struct Case {
    alert: &'static str,
    series: Vec<(String, &'static str)>,
    silent_at: Option<u32>,
    fires_at: Option<u32>,
}

fn case(alert: &'static str, series: &[(&str, &str, &'static str)]) -> Case {
    let series = series.iter().map(|(metric, labels, values)| {
        let of =
            if metric.starts_with("plimsoll_llmdeployment") { "name" } else { "llmdeployment" };
        let comma = if labels.is_empty() { "" } else { "," };
        let whose = match metric.starts_with("plimsoll_operator") {
            true => String::new(),
            false => format!("namespace=\"team\",{of}=\"assistant\"{comma}"),
        };
        (format!("{metric}{{{whose}{labels}}}"), *values)
    });
    Case { alert, series: series.collect(), silent_at: None, fires_at: None }
}

impl Case {
    fn silent_at(self, minute: u32) -> Case {
        Case { silent_at: Some(minute), ..self }
    }

    fn fires_at(self, minute: u32) -> Case {
        Case { fires_at: Some(minute), ..self }
    }

    fn test(&self, alerts: &[Alert]) -> Value {
        let alert = alerts.iter().find(|alert| alert.name == self.alert).unwrap();
        let rule = alert.rule();
        let expected =
            json!([{"exp_labels": rule["labels"], "exp_annotations": rule["annotations"]}]);
        let at = |minute: u32, name: &str, expected: Value| json!({"eval_time": format!("{minute}m"), "alertname": name, "exp_alerts": expected});
        let own = [
            self.silent_at.map(|minute| at(minute, self.alert, json!([]))),
            self.fires_at.map(|minute| at(minute, self.alert, expected)),
        ];
        // No operator is in the series of an object.
        let others = alerts.iter().map(|other| other.name);
        let others = others.filter(|name| ![self.alert, "PlimsollOperatorAbsent"].contains(name));
        let calm = self.fires_at.map(|minute| others.map(move |name| at(minute, name, json!([]))));
        let series =
            self.series.iter().map(|(series, values)| json!({"series": series, "values": values}));
        json!({
            "interval": "1m", "name": self.alert, "input_series": series.collect::<Vec<_>>(),
            "alert_rule_test": own.into_iter().flatten().chain(calm.into_iter().flatten()).collect::<Vec<_>>(),
        })
    }
}

const CONDITION: &str = operator::CONDITION;
const WAITING: &str = "plimsoll_requests_waiting";
const TTFT: &str = "plimsoll_time_to_first_token_seconds_bucket";
const TPOT: &str = "plimsoll_request_time_per_output_token_seconds_bucket";
const KV: &str = "plimsoll_kv_cache_usage_ratio";
const PREEMPTED: &str = "plimsoll_preemptions_total";
const FINISHED: &str = "plimsoll_requests_finished_total";
const RESTARTS: &str = operator::ENGINE_RESTARTS;
const PLANNED: &str = operator::PLAN_MEMORY_BYTES;
const WHOLE: &str = operator::MEMORY_BYTES;

fn of_availability() -> Vec<Case> {
    let ready =
        |status: &str, reason: &str| format!(r#"type="Ready",status="{status}",reason="{reason}""#);
    let (loading, paused) = (ready("False", "EngineLoading"), ready("False", "Suspended"));
    let (unseen, serving) = (ready("Unknown", "Pending"), ready("True", "Serving"));
    vec![
        case("PlimsollNotReady", &[(CONDITION, &loading, "1x30")]).silent_at(14).fires_at(16),
        case("PlimsollNotReady", &[(CONDITION, &unseen, "1x30")]).fires_at(16),
        case("PlimsollNotReady", &[(CONDITION, &paused, "1x30")]).silent_at(30),
        // Ready comes in time: the first series ends, the second goes on.
        case(
            "PlimsollNotReady",
            &[(CONDITION, &loading, "1x10 stale"), (CONDITION, &serving, "_x10 1x20")],
        )
        .silent_at(30),
        case("PlimsollReloadLoop", &[(RESTARTS, r#"pod="a""#, "0x5 1x5 2x5 3x20")])
            .silent_at(14)
            .fires_at(20),
        case(
            "PlimsollReloadLoop",
            &[(RESTARTS, r#"pod="a""#, "0x5 1x30"), (RESTARTS, r#"pod="b""#, "0x9 1x30")],
        )
        .silent_at(30),
    ]
}

fn of_load() -> Vec<Case> {
    let refused = r#"reason="queue_full""#;
    vec![
        case(
            "PlimsollQueueGrowing",
            &[(WAITING, r#"pod="a""#, "1+2x40"), (WAITING, r#"pod="b""#, "1+1x40")],
        )
        .silent_at(12)
        .fires_at(25),
        // Long, but neither growing nor refusing.
        case("PlimsollQueueGrowing", &[(WAITING, r#"pod="a""#, "20x60")]).silent_at(60),
        case("PlimsollQueueGrowing", &[("plimsoll_admission_rejections_total", refused, "0+6x30")])
            .fires_at(10),
        case(
            "PlimsollKvCacheFull",
            &[
                (KV, r#"pod="a""#, "0.4x30"),
                (KV, r#"pod="b""#, "0.99x30"),
                (WAITING, r#"pod="b""#, "3x30"),
            ],
        )
        .silent_at(9)
        .fires_at(12),
        // Full, and nobody waits.
        case("PlimsollKvCacheFull", &[(KV, "", "0.99x30"), (WAITING, "", "0x30")]).silent_at(30),
        case(
            "PlimsollPreemptionStorm",
            &[(PREEMPTED, "", "0+60x30"), (FINISHED, r#"finished_reason="stop""#, "0+60x30")],
        )
        .silent_at(8)
        .fires_at(15),
        case(
            "PlimsollPreemptionStorm",
            &[(PREEMPTED, "", "0+6x30"), (FINISHED, r#"finished_reason="stop""#, "0+60x30")],
        )
        .silent_at(30),
    ]
}

fn of_promises() -> Vec<Case> {
    let (fast, slow, all) = (r#"le="0.5""#, r#"le="0.75""#, r#"le="+Inf""#);
    vec![
        case(
            "PlimsollSloBurnTtft",
            &[(TTFT, fast, "0x30"), (TTFT, slow, "0+60x30"), (TTFT, all, "0+60x30")],
        )
        .fires_at(10),
        // Two minutes are late, of an hour: the long window stays calm.
        case(
            "PlimsollSloBurnTtft",
            &[(TTFT, fast, "0+60x60 3600x10"), (TTFT, slow, "0+60x70"), (TTFT, all, "0+60x70")],
        )
        .silent_at(62),
        case(
            "PlimsollSloBurnTpot",
            &[
                (TPOT, r#"le="0.025""#, "0x30"),
                (TPOT, r#"le="0.1""#, "0+60x30"),
                (TPOT, all, "0+60x30"),
            ],
        )
        .fires_at(10),
        case(
            "PlimsollSloBurnTpot",
            &[
                (TPOT, r#"le="0.025""#, "0+60x30"),
                (TPOT, r#"le="0.1""#, "0+60x30"),
                (TPOT, all, "0+60x30"),
            ],
        )
        .silent_at(30),
        case(
            "PlimsollPlanOff",
            &[(WHOLE, r#"kind="predicted""#, "100x30"), (WHOLE, r#"kind="measured""#, "115x30")],
        )
        .fires_at(16),
        // Less than the sum is what a cache that is not full looks like.
        case(
            "PlimsollPlanOff",
            &[(WHOLE, r#"kind="predicted""#, "100x30"), (WHOLE, r#"kind="measured""#, "60x30")],
        )
        .silent_at(30),
        case(
            "PlimsollPlanOff",
            &[
                ("plimsoll_weights_bytes", "", "20000000x30"),
                ("plimsoll_kv_cache_bytes", "", "60000000x30"),
                (PLANNED, r#"part="weights""#, "20000000x30"),
                (PLANNED, r#"part="kv""#, "50000000x30"),
            ],
        )
        .silent_at(14)
        .fires_at(16),
        case(
            "PlimsollPlanOff",
            &[
                ("plimsoll_weights_bytes", "", "20000000x30"),
                ("plimsoll_kv_cache_bytes", "", "55000000x30"),
                (PLANNED, r#"part="weights""#, "20000000x30"),
                (PLANNED, r#"part="kv""#, "50000000x30"),
            ],
        )
        .silent_at(30),
    ]
}

fn of_the_operator() -> Vec<Case> {
    let (leading, errors) = (operator::LEADING, operator::RECONCILE_ERRORS);
    let (all, writes) = (operator::RECONCILES, operator::WRITES);
    vec![
        // One waits for the Lease, and nobody holds it.
        case("PlimsollOperatorAbsent", &[(leading, r#"pod="b""#, "0x30")]).silent_at(4).fires_at(6),
        case(
            "PlimsollOperatorAbsent",
            &[(leading, r#"pod="a""#, "1x30"), (leading, r#"pod="b""#, "0x30")],
        )
        .silent_at(30),
        case(
            "PlimsollReconcileErrors",
            &[
                (errors, "", "0+20x40"),
                (all, r#"result="error""#, "0+20x40"),
                (all, r#"result="success""#, "0+60x40"),
            ],
        )
        .fires_at(20),
        case(
            "PlimsollReconcileErrors",
            &[(errors, "", "0+1x40"), (all, r#"result="success""#, "0+60x40")],
        )
        .silent_at(40),
        case("PlimsollWritesAtRest", &[(writes, r#"kind="Service""#, "0+600x60")])
            .silent_at(20)
            .fires_at(40),
        case("PlimsollWritesAtRest", &[(writes, r#"kind="Service""#, "0+60x60")]).silent_at(60),
    ]
}

#[test]
fn every_alert_fires_on_its_series_and_on_no_other() {
    if !std::path::Path::new(PROMTOOL).exists() {
        assert!(
            std::env::var("PLIMSOLL_REQUIRE_CLUSTER").is_err(),
            "{PROMTOOL} is missing; tests/setup.sh installs it"
        );
        eprintln!("alerts are not evaluated: {PROMTOOL} is missing");
        return;
    }
    let mut alerts = of_object(&WATCHED);
    alerts.extend(of_operator());
    let cases: Vec<Case> = [of_availability(), of_load(), of_promises(), of_the_operator()]
        .into_iter()
        .flatten()
        .collect();
    for alert in &alerts {
        assert!(
            cases.iter().any(|case| case.alert == alert.name && case.fires_at.is_some()),
            "{}",
            alert.name
        );
        assert!(
            cases.iter().any(|case| case.alert == alert.name && case.silent_at.is_some()),
            "{}",
            alert.name
        );
    }
    let folder = std::env::temp_dir().join(format!("plimsoll-alerts-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let rules = json!({"groups": groups("test", &alerts)});
    let tests: Vec<Value> = cases.iter().map(|case| case.test(&alerts)).collect();
    let file = json!({"rule_files": ["rules.json"], "evaluation_interval": "1m", "tests": tests});
    // JSON is YAML.
    std::fs::write(folder.join("rules.json"), rules.to_string()).unwrap();
    std::fs::write(folder.join("tests.json"), file.to_string()).unwrap();
    let output = Command::new(PROMTOOL)
        .args(["test", "rules", "tests.json"])
        .current_dir(&folder)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_promises_nothing_is_not_held_to_it() {
    let free = Watched { ttft_seconds: None, tpot_seconds: None, ..WATCHED };
    assert!(of_object(&free).iter().all(|alert| !alert.name.starts_with("PlimsollSloBurn")));
}

#[test]
fn an_alert_speaks_of_one_object_only() {
    for alert in of_object(&WATCHED) {
        let selectors = alert.expression.matches("{namespace=\"team\",").count();
        assert_eq!(selectors, alert.expression.matches('{').count(), "{}", alert.expression);
    }
}
