use serde_json::{Value, json};

use super::*;

fn facts_json() -> Value {
    json!({
        "family": "qwen3", "architecture": "Qwen3ForCausalLM",
        "parameters": {"embedding": 1, "attention": 1, "mlp": 1, "norm": 1, "head": 0}, "diskBytes": {},
        "layers": 1, "hidden": 64, "intermediate": 64, "heads": 1, "kvHeads": 1, "headDim": 64,
        "vocabulary": 64, "contextTokens": 64, "tiedHead": true, "chatTemplate": false,
    })
}

fn of<K: serde::de::DeserializeOwned>(body: Value) -> Option<Arc<K>> {
    Some(Arc::new(serde_json::from_value(body).unwrap()))
}

fn job(condition: Option<&str>) -> Option<Arc<Job>> {
    let conditions: Vec<Value> = condition
        .iter()
        .map(|kind| json!({"type": kind, "status": "True", "message": "ran out of attempts"}))
        .collect();
    of(json!({"status": {"conditions": conditions}}))
}

fn ended(message: &str) -> Vec<Arc<Pod>> {
    let state = json!({"terminated": {"exitCode": 1, "message": message}});
    let container = json!({"name": "inspect", "image": "i", "imageID": "i", "ready": false,
        "restartCount": 0, "state": state});
    vec![of(json!({"status": {"containerStatuses": [container]}})).unwrap()]
}

fn seen(job: Option<Arc<Job>>, job_pods: Vec<Arc<Pod>>) -> SeenModel {
    SeenModel { claim: None, facts: None, job, job_pods }
}

fn stored(text: &str) -> Option<Arc<k8s_openapi::api::core::v1::ConfigMap>> {
    of(json!({"data": {FACTS_KEY: text}}))
}

#[test]
fn a_job_tells_the_facts_once_it_is_complete() {
    let text = facts_json().to_string();
    assert_eq!(look(&seen(None, vec![]), false), Model::Unseen);
    assert!(matches!(look(&seen(job(None), vec![]), false), Model::Looking { .. }));
    assert!(matches!(look(&seen(job(None), ended(&text)), false), Model::Looking { .. }));
    assert!(matches!(look(&seen(job(Some("Complete")), ended(&text)), false), Model::Told(_)));
    let silent = look(&seen(job(Some("Complete")), vec![]), false);
    assert!(matches!(silent, Model::Failed { retry: true, .. }));
}

#[test]
fn a_failed_job_speaks_in_the_engines_words_and_says_whether_to_try_again() {
    for (reason, retried) in
        [("ModelNotFound", false), ("CorruptWeights", false), ("Internal", true)]
    {
        let report = json!({"reason": reason, "message": "m"}).to_string();
        match look(&seen(job(Some("Failed")), ended(&report)), false) {
            Model::Failed { report, retry } => {
                assert_eq!((format!("{:?}", report.reason), retry), (reason.to_owned(), retried));
            }
            other => panic!("{other:?}"),
        }
    }
    let wordless = look(&seen(job(Some("Failed")), ended("Segmentation fault")), false);
    let expected =
        ExitReport { reason: ExitReason::Internal, message: "ran out of attempts".to_owned() };
    assert_eq!(wordless, Model::Failed { report: expected, retry: true });
}

#[test]
fn stored_facts_need_no_job_but_a_download_needs_its_claim() {
    let facts = stored(&facts_json().to_string());
    let kept = SeenModel { facts: facts.clone(), ..seen(None, vec![]) };
    assert!(matches!(look(&kept, false), Model::Known(_)));
    assert_eq!(look(&kept, true), Model::Unseen);
    let filling =
        SeenModel { facts: facts.clone(), claim: of(json!({})), ..seen(job(None), vec![]) };
    assert!(matches!(look(&filling, true), Model::Looking { .. }));
    let filled = SeenModel { facts, claim: of(json!({})), ..seen(job(Some("Complete")), vec![]) };
    assert!(matches!(look(&filled, true), Model::Known(_)));
    let spoilt = SeenModel { facts: stored("{}"), ..seen(None, vec![]) };
    assert_eq!(look(&spoilt, false), Model::Unseen);
}

#[test]
fn a_job_without_a_node_repeats_the_scheduler() {
    let condition = json!({"type": "PodScheduled", "status": "False",
        "message": "persistentvolumeclaim \"models\" not found"});
    let pod = of(json!({"status": {"conditions": [condition]}})).unwrap();
    let Model::Looking { message } = look(&seen(job(None), vec![pod]), false) else { panic!() };
    assert!(message.contains("persistentvolumeclaim \"models\" not found"), "{message}");
}

#[test]
fn a_job_goes_when_it_has_told_the_facts_was_outgrown_or_failed_and_is_due_again() {
    let looking = || look(&seen(job(None), vec![]), false);
    let told = || look(&seen(job(Some("Complete")), ended(&facts_json().to_string())), false);
    let failed = |reason: &str| {
        let report = json!({"reason": reason, "message": "m"}).to_string();
        look(&seen(job(Some("Failed")), ended(&report)), false)
    };
    for (model, outgrown, due, spent) in [
        (Model::Unseen, false, true, false),
        (looking(), false, true, false),
        (looking(), true, false, true),
        (told(), false, false, true),
        (failed("Internal"), false, false, false),
        (failed("Internal"), false, true, true),
        (failed("ModelNotFound"), false, true, false),
        (failed("ModelNotFound"), true, false, true),
    ] {
        assert_eq!(is_spent(&model, outgrown, due), spent, "{model:?} {outgrown} {due}");
    }
}
