//! The door: an object as a person wrote it enters, a [`Spec`] that cannot be wrong leaves, or every problem at once
//! with its field and remedy. Pure. What the API server's rules refuse is refused here too, because `plimsoll up` has no
//! API server; defaults are resolved here and never written back.

use std::fmt;

use plimsoll_crds as crds;
use plimsoll_crds::{
    AccessMode, Amount, Clients, LLMDeployment, LLMDeploymentSpec, OperatorUpgrade, PlanApply,
    RolloutStrategy,
};
use serde::Serialize;
use serde_json::Value;

use crate::amount;

pub mod preferences;
mod source;
#[cfg(test)]
mod tests;

pub use preferences::Preferences;
pub use source::Source;

const TOKENS_MAX: i64 = 16_777_216;
const CACHE_TOKENS_MAX: i64 = 1_000_000_000;
const CONTEXT_TOKENS_MIN: i64 = 64;
const CONCURRENCY_MAX: i64 = 1024;
const DRAIN_SECONDS_MAX: i64 = 3600;
const DRAIN_SECONDS_DEFAULT: u32 = 60;
const QUEUE_PER_REPLICA_DEFAULT: u32 = 8;
const QUEUE_PER_REPLICA_MAX: i64 = 10_000;
const STABILIZATION_SECONDS_MIN: i64 = 10;
const STABILIZATION_SECONDS_MAX: i64 = 3600;
const STABILIZATION_SECONDS_DEFAULT: u32 = 300;
const STORAGE_SIZE_DEFAULT: &str = "20Gi";
const HUB_TOKEN_KEY_DEFAULT: &str = "token";
const API_KEYS_KEY_DEFAULT: &str = "keys";

/// What is wanted, checked, with defaults resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub name: String,
    pub source: Source,
    pub served_name: String,
    /// Where the download finds the hub's token.
    pub credentials: Option<SecretKey>,
    /// Where the engine finds the keys that clients must present.
    pub api_keys: Option<SecretKey>,
    pub workload: Workload,
    pub context_tokens: Option<u32>,
    pub preferences: Preferences,
    pub cache_tokens: Option<u64>,
    pub prefix_reuse: bool,
    /// Pods to plan for: with `scaling` the fewest that it allows.
    pub replicas: u32,
    pub scaling: Option<Scaling>,
    pub storage: Storage,
    pub budget: Budget,
    pub plan: PlanPolicy,
    pub drain_seconds: u32,
    pub strategy: RolloutStrategy,
    pub operator_upgrade: OperatorUpgrade,
    /// Who may reach the engine, where the object says.
    pub clients: Option<Clients>,
    pub suspend: bool,
    pub pod_template: Option<Value>,
}

/// Which plans may run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanPolicy {
    /// None runs before a person has named it.
    pub manual: bool,
    /// The one that may run.
    pub pinned_hash: Option<String>,
}

/// One entry of a Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretKey {
    pub name: String,
    pub key: String,
}

/// The load to plan for; what is absent is the planner's to assume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    pub prompt_tokens: Option<u32>,
    pub output_tokens: Option<u32>,
    pub concurrency: Option<u32>,
}

impl Workload {
    /// Tokens of prompt and answer of one request as far as the spec says; a missing half is what `usual` tokens leave beside
    /// the other, at least one.
    pub fn request(&self, usual: u32) -> Option<(u32, u32)> {
        let rest = |one: u32| usual.saturating_sub(one).max(1);
        match (self.prompt_tokens, self.output_tokens) {
            (Some(prompt), Some(output)) => Some((prompt, output)),
            (Some(prompt), None) => Some((prompt, rest(prompt))),
            (None, Some(output)) => Some((rest(output), output)),
            (None, None) => None,
        }
    }
}

/// Within which bounds and after which aims the number of replicas is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scaling {
    pub min: u32,
    pub max: u32,
    pub queue_per_replica: u32,
    pub stabilization_seconds: u32,
}

/// The volume of a download.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Storage {
    pub access_mode: AccessMode,
    pub size: String,
    pub storage_class_name: Option<String>,
}

/// What one pod may use at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    pub cpu_millis: Option<u32>,
    pub memory_bytes: Option<u64>,
}

/// Everything that is wrong with a spec; never empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct SpecError {
    pub problems: Vec<Problem>,
}

/// One field that cannot work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub field: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for SpecError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Problem { field, message }) in self.problems.iter().enumerate() {
            let separator = if index > 0 { "; " } else { "" };
            write!(out, "{separator}{field}: {message}")?;
        }
        Ok(())
    }
}

impl Spec {
    pub fn parse(object: &LLMDeployment) -> Result<Spec, SpecError> {
        let mut door = Door::default();
        let spec = door.spec(object);
        door.cross_checks(&object.spec);
        match spec {
            Some(spec) if door.problems.is_empty() => Ok(spec),
            _ => Err(SpecError { problems: door.problems }),
        }
    }
}

/// Collects problems while fields are read.
#[derive(Default)]
struct Door {
    problems: Vec<Problem>,
}

impl Door {
    fn refuse(&mut self, field: &str, message: impl Into<String>) {
        self.problems.push(Problem { field: field.to_owned(), message: message.into() });
    }

    fn check(&mut self, holds: bool, field: &str, message: &str) {
        if !holds {
            self.refuse(field, message);
        }
    }

    /// None only where a problem was noted.
    fn spec(&mut self, object: &LLMDeployment) -> Option<Spec> {
        let LLMDeploymentSpec {
            model,
            auth,
            workload,
            objective: _,
            slo: _,
            quantization: _,
            quality: _,
            tensor_parallel: _,
            accelerators: _,
            context_tokens,
            cache,
            replicas,
            scaling,
            storage,
            resources,
            plan,
            rollout,
            network,
            suspend,
            pod_template,
        } = &object.spec;
        let name = self.name(object.metadata.name.as_deref().unwrap_or_default());
        let source = match source::parse(&model.source) {
            Ok(source) => Some(source),
            Err(message) => {
                self.refuse("spec.model.source", message);
                None
            }
        };
        let served_name = self.served_name(model.name.as_deref(), &name);
        let credentials = model.credentials.as_ref().map(|credentials| {
            let field = "spec.model.credentials.secretRef";
            self.secret(&credentials.secret_ref, field, HUB_TOKEN_KEY_DEFAULT)
        });
        let api_keys = auth.as_ref().map(|auth| {
            self.secret(
                &auth.api_keys_secret_ref,
                "spec.auth.apiKeysSecretRef",
                API_KEYS_KEY_DEFAULT,
            )
        });
        let cache = cache.clone().unwrap_or_default();
        let rollout = rollout.clone().unwrap_or_default();
        let drain = rollout.drain_seconds.map(i64::from);
        let replicas_max = i64::from(crds::REPLICAS_MAX);
        let replicas = self
            .between(Some(i64::from(*replicas)), 0, replicas_max, "spec.replicas")
            .unwrap_or_default();
        let scaling = scaling.as_ref().and_then(|scaling| self.scaling(scaling));
        self.pod_template(pod_template.as_ref());
        Some(Spec {
            workload: self.workload(workload.as_ref()),
            context_tokens: self.between(
                *context_tokens,
                CONTEXT_TOKENS_MIN,
                TOKENS_MAX,
                "spec.contextTokens",
            ),
            preferences: self.preferences(&object.spec),
            cache_tokens: self
                .between(cache.tokens, CONTEXT_TOKENS_MIN, CACHE_TOKENS_MAX, "spec.cache.tokens")
                .map(u64::from),
            prefix_reuse: cache.prefix_reuse.unwrap_or(true),
            replicas: scaling.map_or(replicas, |scaling| scaling.min),
            scaling,
            storage: self.storage(storage.as_ref()),
            budget: self.budget(resources.as_ref()),
            plan: self.plan_policy(plan.as_ref()),
            drain_seconds: self
                .between(drain, 0, DRAIN_SECONDS_MAX, "spec.rollout.drainSeconds")
                .unwrap_or(DRAIN_SECONDS_DEFAULT),
            strategy: rollout.strategy.unwrap_or_default(),
            operator_upgrade: rollout.operator_upgrade.unwrap_or_default(),
            clients: network.as_ref().and_then(|network| network.clients),
            suspend: *suspend,
            pod_template: pod_template.clone(),
            name,
            source: source?,
            served_name,
            credentials,
            api_keys,
        })
    }

    fn name(&mut self, name: &str) -> String {
        let mut characters = name.chars();
        let good = name.len() <= crds::NAME_CHARACTERS_MAX
            && characters.next().is_some_and(|first| first.is_ascii_lowercase())
            && characters.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && !name.ends_with('-');
        self.check(
            good,
            "metadata.name",
            "becomes the name of a Service: use at most 53 lower-case letters, digits and '-', starting with a letter",
        );
        name.to_owned()
    }

    fn served_name(&mut self, given: Option<&str>, object_name: &str) -> String {
        let Some(given) = given else { return object_name.to_owned() };
        let good = (1..=128).contains(&given.len())
            && given.starts_with(|c: char| c.is_ascii_alphanumeric())
            && given.chars().all(|c| c.is_ascii_alphanumeric() || "._:/-".contains(c));
        self.check(
            good,
            "spec.model.name",
            "may hold at most 128 letters, digits and . _ : / - and starts with a letter or digit",
        );
        given.to_owned()
    }

    fn secret(&mut self, given: &crds::SecretKey, field: &str, key_default: &str) -> SecretKey {
        let crds::SecretKey { name, key } = given;
        let name_good = (1..=253).contains(&name.len())
            && name
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c))
            && !name.starts_with(['-', '.'])
            && !name.ends_with(['-', '.']);
        self.check(
            name_good,
            &format!("{field}.name"),
            "the name of a Secret holds lower-case letters, digits, '-' and '.'",
        );
        let key = key.as_deref().unwrap_or(key_default);
        let key_good = (1..=253).contains(&key.len())
            && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        self.check(
            key_good,
            &format!("{field}.key"),
            "the key of a Secret holds letters, digits, '-', '_' and '.'",
        );
        SecretKey { name: name.clone(), key: key.to_owned() }
    }

    fn workload(&mut self, given: Option<&crds::Workload>) -> Workload {
        let Some(crds::Workload { prompt_tokens, output_tokens, concurrency }) = given else {
            return Workload::default();
        };
        let concurrency = concurrency.map(i64::from);
        Workload {
            prompt_tokens: self.between(
                *prompt_tokens,
                1,
                TOKENS_MAX,
                "spec.workload.promptTokens",
            ),
            output_tokens: self.between(
                *output_tokens,
                1,
                TOKENS_MAX,
                "spec.workload.outputTokens",
            ),
            concurrency: self.between(concurrency, 1, CONCURRENCY_MAX, "spec.workload.concurrency"),
        }
    }

    /// None only where a problem was noted.
    fn scaling(&mut self, given: &crds::Scaling) -> Option<Scaling> {
        let crds::Scaling { min, max, queue_per_replica, stabilization_window_seconds } = *given;
        let replicas_max = i64::from(crds::REPLICAS_MAX);
        let min = i64::from(min.unwrap_or(1));
        self.check(
            min >= 1,
            "spec.scaling.min",
            "must be 1 or more: scaling to zero needs the gateway that holds requests while a replica starts, which is not there yet; spec.suspend stops all pods",
        );
        self.check(
            min <= i64::from(max),
            "spec.scaling.min",
            "is above spec.scaling.max: lower min or raise max",
        );
        let queue = queue_per_replica.map(i64::from);
        let window = stabilization_window_seconds.map(i64::from);
        Some(Scaling {
            min: u32::try_from(min).ok().filter(|min| *min >= 1)?,
            max: self.between(Some(max.into()), 1, replicas_max, "spec.scaling.max")?,
            queue_per_replica: self
                .between(queue, 1, QUEUE_PER_REPLICA_MAX, "spec.scaling.queuePerReplica")
                .unwrap_or(QUEUE_PER_REPLICA_DEFAULT),
            stabilization_seconds: self
                .between(
                    window,
                    STABILIZATION_SECONDS_MIN,
                    STABILIZATION_SECONDS_MAX,
                    "spec.scaling.stabilizationWindowSeconds",
                )
                .unwrap_or(STABILIZATION_SECONDS_DEFAULT),
        })
    }

    fn storage(&mut self, given: Option<&crds::Storage>) -> Storage {
        let crds::Storage { access_mode, size, storage_class_name } =
            given.cloned().unwrap_or_default();
        self.amount(size.as_ref(), "spec.storage.size", "50Gi");
        let class_good =
            storage_class_name.as_ref().is_none_or(|class| (1..=253).contains(&class.len()));
        self.check(class_good, "spec.storage.storageClassName", "must have 1 to 253 characters");
        Storage {
            access_mode: access_mode.unwrap_or(AccessMode::ReadWriteOnce),
            size: size.map_or_else(|| STORAGE_SIZE_DEFAULT.to_owned(), |size| size.0),
            storage_class_name,
        }
    }

    fn budget(&mut self, given: Option<&crds::Resources>) -> Budget {
        let crds::Resources { cpu, memory } = given.cloned().unwrap_or_default();
        let cpu_millis = self.amount(cpu.as_ref(), "spec.resources.cpu", "2 or 500m");
        let memory_millis = self.amount(memory.as_ref(), "spec.resources.memory", "4Gi");
        Budget {
            cpu_millis: cpu_millis.map(|millis| u32::try_from(millis).unwrap_or(u32::MAX)),
            memory_bytes: memory_millis.map(|millis| millis.div_ceil(1000)),
        }
    }

    fn plan_policy(&mut self, given: Option<&crds::PlanPolicy>) -> PlanPolicy {
        let crds::PlanPolicy { apply, pinned_hash } = given.cloned().unwrap_or_default();
        let good = pinned_hash.as_ref().is_none_or(|hash| {
            (1..=64).contains(&hash.len())
                && hash.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c))
        });
        self.check(
            good,
            "spec.plan.pinnedHash",
            "is the hash of a plan, as status.offered.hash or status.plan.hash shows it: digits and the letters a to f",
        );
        PlanPolicy { manual: apply == Some(PlanApply::Manual), pinned_hash }
    }

    fn amount(&mut self, given: Option<&Amount>, field: &str, example: &str) -> Option<u64> {
        let parsed = amount::millis(&given?.0);
        if parsed.is_none() {
            self.refuse(field, format!("must be a positive quantity, for instance {example}"));
        }
        parsed
    }

    fn pod_template(&mut self, given: Option<&Value>) {
        let good = given.is_none_or(Value::is_object);
        self.check(good, "spec.podTemplate", "must be an object with metadata and spec of a pod");
    }

    fn between(&mut self, given: Option<i64>, min: i64, max: i64, field: &str) -> Option<u32> {
        let given = given?;
        if !(min..=max).contains(&given) {
            self.refuse(field, format!("must lie between {min} and {max}, and is {given}"));
            return None;
        }
        Some(u32::try_from(given).expect("every bound is below 2^32"))
    }

    /// Fields that are good alone and not together.
    fn cross_checks(&mut self, spec: &LLMDeploymentSpec) {
        let from_hub = spec.model.source.starts_with("hf://");
        self.check(
            from_hub || spec.storage.is_none(),
            "spec.storage",
            "holds downloads of hf:// sources only: remove it, a pvc:// or file:// source brings its own storage",
        );
        self.check(
            from_hub || spec.model.credentials.is_none(),
            "spec.model.credentials",
            "are sent to a model hub only: remove them, or use an hf:// source",
        );
        let Some(context) = spec.context_tokens else { return };
        let request = spec
            .workload
            .as_ref()
            .and_then(|workload| workload.prompt_tokens?.checked_add(workload.output_tokens?));
        self.check(
            request.is_none_or(|request| request <= context),
            "spec.workload",
            "promptTokens + outputTokens exceed spec.contextTokens, so such a request could never run: raise contextTokens or lower the workload",
        );
        let cache = spec.cache.as_ref().and_then(|cache| cache.tokens);
        self.check(
            cache.is_none_or(|cache| context <= cache),
            "spec.cache.tokens",
            "is below spec.contextTokens, so a request of full length could never run: raise cache.tokens or lower contextTokens",
        );
    }
}
