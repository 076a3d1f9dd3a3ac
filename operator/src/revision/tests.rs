use plimsoll_crds::{Clients, RolloutStrategy};

use super::*;
use crate::desired::Surroundings;
use crate::desired::monitoring::Promises;

fn content(digest: &str) -> Content {
    let engine = json!([{"name": "engine", "image": "a"}]);
    let template = json!({"metadata": {"labels": {}}, "spec": {"containers": engine}});
    fixtures::content(&json!({"specDigest": digest, "podTemplate": template}))
}

const AUTO: PlanPolicy = PlanPolicy { manual: false, pinned_hash: None };
const MANUAL: PlanPolicy = PlanPolicy { manual: true, pinned_hash: None };

fn pinned(manual: bool, hash: &str) -> PlanPolicy {
    PlanPolicy { manual, pinned_hash: Some(hash.to_owned()) }
}

/// A revision with a plan of its own, for the spec `digest`; `replaces` another.
fn planned(all: &[Revision], digest: &str, plan: &str, replaces: Option<&Revision>) -> Revision {
    let mut content = content(digest);
    content.plan.hash = plan.to_owned();
    content.pod_template["spec"]["containers"][0]["args"] = json!([plan]);
    content.replaces = replaces.map(|revision| revision.hash.clone());
    new("assistant", all, content)
}

fn stored(revision: &Revision) -> Arc<ControllerRevision> {
    let identity = Identity { namespace: "n".into(), name: "assistant".into(), uid: "u".into() };
    Arc::new(serde_json::from_value(wanted(&identity, revision).body).unwrap())
}

fn spec(fields: Value) -> LLMDeploymentSpec {
    let mut whole = json!({"model": {"source": "pvc://models"}});
    for (name, field) in fields.as_object().unwrap() {
        whole[name] = field.clone();
    }
    serde_json::from_value(whole).unwrap()
}

#[test]
fn only_what_makes_another_pod_makes_another_digest() {
    let base = spec_digest(&spec(json!({})));
    for same in [
        json!({"replicas": 7}),
        json!({"suspend": true}),
        json!({"replicas": 0, "suspend": false}),
        json!({"scaling": {"max": 4}}),
        json!({"rollout": {"strategy": "Recreate", "operatorUpgrade": "Follow"}}),
        json!({"plan": {"apply": "Manual", "pinnedHash": "11aa22bb"}}),
    ] {
        assert_eq!(spec_digest(&spec(same.clone())), base, "{same}");
    }
    for other in [
        json!({"contextTokens": 512}),
        json!({"rollout": {"strategy": "Surge", "drainSeconds": 5}}),
        json!({"podTemplate": {"metadata": {"labels": {"a": "b"}}}}),
        json!({"model": {"source": "pvc://other"}}),
    ] {
        assert_ne!(spec_digest(&spec(other.clone())), base, "{other}");
    }
}

#[test]
fn a_stored_revision_reads_back_as_it_was_made() {
    let first = new("assistant", &[], content("d1"));
    let second = new("assistant", std::slice::from_ref(&first), content("d2"));
    assert_eq!((first.number, second.number), (1, 2));
    assert_ne!(first.name, second.name);
    let read = committed(&[stored(&first), stored(&second)], "u");
    assert_eq!(read, [second.clone(), first.clone()]);
    assert_eq!(answering(&read, "d1", &AUTO, None), Some(&first));
    assert_eq!(answering(&read, "d3", &AUTO, None), None);
    assert!(committed(&[stored(&first)], "someone else").is_empty());
    let labels = &second.content.pod_template["metadata"]["labels"];
    assert_eq!(labels[names::REVISION], second.hash.as_str());
}

#[test]
fn a_revision_of_another_renderer_is_rendered_from_as_it_stands() {
    let mut old = content("d");
    old.template_version = TEMPLATE_VERSION + 41;
    old.pod_template["spec"]["containers"][0]["image"] = "of/another:time".into();
    let old = new("assistant", &[], old);
    let read = committed(&[stored(&old)], "u");
    let found = answering(&read, "d", &AUTO, None).unwrap();
    let identity = Identity { namespace: "n".into(), name: "assistant".into(), uid: "u".into() };
    let settings = crate::desired::tests::settings();
    let promises = Promises::default();
    let around =
        Surroundings { replicas: 1, clients: Clients::Cluster, promises, settings: &settings };
    let rollout = crate::rollout::hold(found, None, RolloutStrategy::Auto);
    let children = crate::desired::children(&identity, &rollout, around);
    assert_eq!(children.deployment.body["spec"]["template"], old.content.pod_template);
}

#[test]
fn what_runs_is_what_the_deployment_stands_for_and_else_the_newest() {
    let first = new("assistant", &[], content("d1"));
    let second = new("assistant", std::slice::from_ref(&first), content("d2"));
    let both = [second.clone(), first.clone()];
    assert_eq!(running(&both, Some(&first.hash)), Some(&first));
    assert_eq!(running(&both, None), Some(&second));
    assert_eq!(running(&both, Some("gone")), Some(&second));
    assert_eq!(running(&[], None), None);
}

#[test]
fn the_history_is_bounded_and_spares_what_stands() {
    let mut all: Vec<Revision> = Vec::new();
    for index in 0..9 {
        let next = new("assistant", &all, content(&index.to_string()));
        all.insert(0, next);
    }
    let oldest = all.last().unwrap().name.clone();
    let forgotten = to_forget(&all, Some(&oldest), None);
    assert_eq!(forgotten.len(), all.len() - 1 - HISTORY_MAX);
    assert!(!forgotten.contains(&oldest.as_str()) && !forgotten.contains(&all[0].name.as_str()));
    let good = all[7].hash.as_str();
    assert!(!to_forget(&all, Some(&oldest), Some(good)).contains(&all[7].name.as_str()));
}

#[test]
fn an_object_without_a_digest_change_keeps_its_revision_over_a_round_trip_of_its_spec() {
    let object =
        LLMDeployment::new("assistant", spec(json!({"podTemplate": {"spec": {"b": 1, "a": 2}}})));
    let text = serde_json::to_string(&object.spec).unwrap();
    let again: LLMDeploymentSpec = serde_json::from_str(&text).unwrap();
    assert_eq!(spec_digest(&again), spec_digest(&object.spec));
}

#[test]
fn a_plan_that_waits_runs_only_once_it_is_pinned_and_then_stays() {
    let first = planned(&[], "d", "aa", None);
    let mut second = planned(std::slice::from_ref(&first), "d", "bb", Some(&first));
    second.content.waits_for_pin = true;
    let all = [second.clone(), first.clone()];
    let deployed = Some(first.hash.as_str());
    assert_eq!(answering(&all, "d", &AUTO, deployed), Some(&first), "it is only offered");
    assert_eq!(offered(&all, &first), Some(&second));
    assert_eq!(answering(&all, "d", &pinned(false, "bb"), deployed), Some(&second));
    assert_eq!(answering(&all, "d", &pinned(true, "cc"), deployed), None);
    // Once it stands, the pin may go.
    let deployed = Some(second.hash.as_str());
    assert_eq!(answering(&all, "d", &AUTO, deployed), Some(&second));
    assert_eq!(offered(&all, &second), None);
    assert_eq!(running(&all, None), Some(&first), "nothing that only waits");
}

#[test]
fn manual_keeps_what_stands_and_takes_nothing_else_without_a_hash() {
    let first = planned(&[], "d", "aa", None);
    let all = [first.clone()];
    assert_eq!(answering(&all, "d", &MANUAL, Some(&first.hash)), Some(&first));
    assert_eq!(answering(&all, "d", &MANUAL, None), None);
    assert_eq!(answering(&all, "d", &pinned(true, "aa"), None), Some(&first));
    assert_eq!(answering(&all, "other", &pinned(true, "aa"), None), None, "of another spec");
}

#[test]
fn what_ran_out_of_memory_gives_way_to_its_successor_whatever_stands_by_then() {
    let first = planned(&[], "d", "aa", None);
    let second = planned(std::slice::from_ref(&first), "d", "bb", Some(&first));
    let all = [second.clone(), first.clone()];
    assert_eq!(answering(&all, "d", &AUTO, None), Some(&second));
    assert_eq!(answering(&all, "d", &AUTO, Some("of another spec")), Some(&second));
    // Until its children stand the first is looked at again, and found to be out of memory again.
    assert_eq!(answering(&all, "d", &AUTO, Some(&first.hash)), Some(&first));
}

#[test]
fn plans_that_only_waited_do_not_push_history_out() {
    let mut all: Vec<Revision> = Vec::new();
    for index in 0..12 {
        let mut next = planned(&all, "d", &format!("{index:x}"), None);
        next.content.waits_for_pin = index % 2 == 0;
        all.insert(0, next);
    }
    let forgotten = to_forget(&all, None, None);
    let kept: Vec<_> = all.iter().filter(|held| !forgotten.contains(&held.name.as_str())).collect();
    let waiting = kept.iter().filter(|held| held.content.waits_for_pin).count();
    assert_eq!((waiting, kept.len() - waiting), (WAITING_MAX, HISTORY_MAX));
    assert_eq!(proposal(&all, "d"), all.iter().find(|held| held.content.waits_for_pin));
    assert_eq!(proposal(&all, "other"), None);
}

#[test]
fn what_status_names_stands_where_the_deployment_was_deleted() {
    let mut object = LLMDeployment::new("assistant", spec(json!({})));
    assert_eq!(standing_hash(&object, None), None);
    object.status = serde_json::from_value(json!({"revision": "assistant-11aa"})).unwrap();
    assert_eq!(standing_hash(&object, None).as_deref(), Some("11aa"));
    let labels = json!({"plimsoll.dev/revision": "22bb"});
    let deployment = serde_json::from_value(json!({"metadata": {"labels": labels}})).unwrap();
    assert_eq!(standing_hash(&object, Some(&deployment)).as_deref(), Some("22bb"));
}
