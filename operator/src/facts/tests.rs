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
    SeenModel { claim: None, facts: None, job, policy: None, job_pods }
}

fn at_start(seen: &SeenModel, downloads: bool) -> Model {
    look(seen, downloads, Timestamp::UNIX_EPOCH)
}

fn stored(text: &str) -> Option<Arc<k8s_openapi::api::core::v1::ConfigMap>> {
    of(json!({"data": {FACTS_KEY: text}}))
}

#[test]
fn a_job_tells_the_facts_once_it_is_complete() {
    let text = facts_json().to_string();
    assert_eq!(at_start(&seen(None, vec![]), false), Model::Unseen);
    assert!(matches!(at_start(&seen(job(None), vec![]), false), Model::Looking { .. }));
    assert!(matches!(at_start(&seen(job(None), ended(&text)), false), Model::Looking { .. }));
    assert!(matches!(at_start(&seen(job(Some("Complete")), ended(&text)), false), Model::Told(_)));
    let silent = at_start(&seen(job(Some("Complete")), vec![]), false);
    assert!(matches!(silent, Model::Failed { retry: true, .. }));
}

#[test]
fn a_failed_job_speaks_in_the_engines_words_and_says_whether_to_try_again() {
    for (reason, retried) in
        [("ModelNotFound", false), ("CorruptWeights", false), ("Internal", true)]
    {
        let report = json!({"reason": reason, "message": "m"}).to_string();
        match at_start(&seen(job(Some("Failed")), ended(&report)), false) {
            Model::Failed { report, retry } => {
                assert_eq!((format!("{:?}", report.reason), retry), (reason.to_owned(), retried));
            }
            other => panic!("{other:?}"),
        }
    }
    let wordless = at_start(&seen(job(Some("Failed")), ended("Segmentation fault")), false);
    let expected = ExitReport::new(ExitReason::Internal, "ran out of attempts");
    assert_eq!(wordless, Model::Failed { report: expected, retry: true });
}

#[test]
fn stored_facts_need_no_job_but_a_download_needs_its_claim() {
    let facts = stored(&facts_json().to_string());
    let kept = SeenModel { facts: facts.clone(), ..seen(None, vec![]) };
    assert!(matches!(at_start(&kept, false), Model::Known(_)));
    assert_eq!(at_start(&kept, true), Model::Unseen);
    let filling =
        SeenModel { facts: facts.clone(), claim: of(json!({})), ..seen(job(None), vec![]) };
    assert!(matches!(at_start(&filling, true), Model::Looking { .. }));
    let filled = SeenModel { facts, claim: of(json!({})), ..seen(job(Some("Complete")), vec![]) };
    assert!(matches!(at_start(&filled, true), Model::Known(_)));
    let spoilt = SeenModel { facts: stored("{}"), ..seen(None, vec![]) };
    assert_eq!(at_start(&spoilt, false), Model::Unseen);
}

#[test]
fn a_job_without_a_node_repeats_the_scheduler() {
    let condition = json!({"type": "PodScheduled", "status": "False",
        "message": "persistentvolumeclaim \"models\" not found"});
    let pod = of(json!({"status": {"conditions": [condition]}})).unwrap();
    let Model::Looking { reason, message } = at_start(&seen(job(None), vec![pod]), false) else {
        panic!()
    };
    assert_eq!(reason, Reason::ClaimNotFound);
    assert!(message.contains("persistentvolumeclaim \"models\" not found"), "{message}");
}

#[test]
fn a_job_goes_when_it_has_told_the_facts_was_outgrown_or_failed_and_is_due_again() {
    let looking = || at_start(&seen(job(None), vec![]), false);
    let told = || at_start(&seen(job(Some("Complete")), ended(&facts_json().to_string())), false);
    let failed = |reason: &str| {
        let report = json!({"reason": reason, "message": "m"}).to_string();
        at_start(&seen(job(Some("Failed")), ended(&report)), false)
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

#[test]
fn a_job_that_is_let_no_pod_make_says_where_to_look_after_half_a_minute() {
    let job: Option<Arc<Job>> = of(json!({
        "metadata": {"name": "inspect-k", "creationTimestamp": "1970-01-01T00:00:10Z"}}));
    let told = |seconds: i64| {
        let now = Timestamp::from_second(seconds).unwrap();
        match look(&seen(job.clone(), vec![]), false, now) {
            Model::Looking { reason: Reason::Inspecting, message } => message,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(told(39), "the inspect Job has no pod yet");
    assert!(told(40).contains("`kubectl describe job inspect-k`"), "{}", told(40));
    let left = pod_patience_left(&job.clone().unwrap(), Timestamp::from_second(15).unwrap());
    assert_eq!(left, Some(Duration::from_secs(25)));
}

#[test]
fn a_job_that_waits_for_its_volumes_names_them_after_a_minute() {
    let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "lastTransitionTime": "1970-01-01T00:00:10Z"});
    let pod: Arc<Pod> = of(json!({
        "metadata": {"name": "inspect-k-x"},
        "spec": {"containers": [], "volumes": [
            {"name": "hub-token", "secret": {"secretName": "hf", "items": [{"key": "token", "path": "token"}]}},
            {"name": "model", "persistentVolumeClaim": {"claimName": "model-k"}}]},
        "status": {"conditions": [condition("PodScheduled", "True"), condition("PodReadyToStartContainers", "False")],
            "containerStatuses": [{"name": "inspect", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"waiting": {"reason": "ContainerCreating"}}}]},
    }))
    .unwrap();
    let after = |seconds: i64| {
        let now = Timestamp::from_second(seconds).unwrap();
        look(&seen(job(None), vec![pod.clone()]), false, now)
    };
    let left = |seconds: i64| mount_patience_left(&pod, Timestamp::from_second(seconds).unwrap());
    assert_eq!(
        (left(10), left(69), left(71)),
        (Some(MOUNT_PATIENCE), Some(Duration::from_secs(1)), Some(Duration::ZERO))
    );
    assert!(matches!(after(69), Model::Looking { reason: Reason::Inspecting, .. }));
    let Model::Looking { reason: Reason::VolumeNotMounted, message } = after(71) else { panic!() };
    assert!(message.contains("Secret hf (key token), claim model-k"), "{message}");
}

#[test]
fn a_container_that_cannot_be_made_tells_which_secret_is_missing() {
    for (word, words, reason) in [
        ("CreateContainerConfigError", "secret \"keys\" not found", Some(Reason::SecretNotFound)),
        (
            "CreateContainerConfigError",
            "couldn't find key k in Secret team/keys",
            Some(Reason::SecretNotFound),
        ),
        ("CreateContainerConfigError", "configmap \"c\" not found", None),
        ("ErrImagePull", "no such image", Some(Reason::ImagePullFailed)),
    ] {
        let container = serde_json::from_value(
            json!({"name": "engine", "image": "i", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"waiting": {"reason": word, "message": words}}}),
        )
        .unwrap();
        assert_eq!(kept_waiting(&container), Some((reason, format!("{word}: {words}"))));
    }
}
