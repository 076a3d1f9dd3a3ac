//! In: Kubernetes objects as JSON. Out: whether a field we own differs, the overlay of one template on another, the
//! form the API server gives back, a canonical text for hashing. Never here: a client, a kind, a decision.
//!
//! Lists follow Kubernetes' merge keys: containers and variables by name, mounts by path, owners by uid. A list whose
//! elements carry no such key is one value.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// Merge keys, the more telling first: an owner has a name too, a mount names its volume.
const LIST_KEYS: &[&str] = &["uid", "mountPath", "containerPort", "topologyKey", "name"];

/// True where `live` lacks a field of `want` or has another value there. Fields that only `live` has are others'.
#[cfg(test)]
pub fn differs(want: &Value, live: &Value) -> bool {
    difference(want, live).is_some()
}

/// The path of the first field of `want` that `live` lacks or has another value for (`spec.replicas`), empty where the
/// whole is another. Fields that only `live` has are others'.
pub fn difference(want: &Value, live: &Value) -> Option<String> {
    match (want, live) {
        (Value::Object(want), Value::Object(live)) => want.iter().find_map(|(name, field)| {
            let inner =
                live.get(name).map_or(Some(String::new()), |held| difference(field, held))?;
            Some(joined(name, &inner))
        }),
        (Value::Array(want), Value::Array(live)) => match list_key(want) {
            Some(key) => want.iter().find_map(|item| {
                let held = find(live, key, &item[key]);
                let inner = held.map_or(Some(String::new()), |held| difference(item, held))?;
                let name = item[key].as_str().map_or_else(|| item[key].to_string(), str::to_owned);
                Some(joined(&format!("[{name}]"), &inner))
            }),
            None if want.len() != live.len() => Some(String::new()),
            None => want.iter().zip(live).find_map(|(item, held)| difference(item, held)),
        },
        (want, live) => (want != live).then(String::new),
    }
}

/// `spec` and `replicas` are `spec.replicas`; `ports` and `[http]` are `ports[http]`.
fn joined(name: &str, inner: &str) -> String {
    match inner {
        "" => name.to_owned(),
        inner if inner.starts_with('[') => format!("{name}{inner}"),
        inner => format!("{name}.{inner}"),
    }
}

/// `live` with `want` imposed on it: what only `live` has is kept, except elements of lists that `want` speaks of.
pub fn impose(want: &Value, live: &mut Value) {
    match (want, live) {
        (Value::Object(want), Value::Object(live)) => {
            for (name, field) in want {
                impose(field, live.entry(name.clone()).or_insert(Value::Null));
            }
        }
        (Value::Array(want), Value::Array(live)) => {
            let key = list_key(want);
            let imposed = want.iter().map(|item| {
                let mut held =
                    key.and_then(|key| find(live, key, &item[key]).cloned()).unwrap_or(Value::Null);
                impose(item, &mut held);
                held
            });
            *live = imposed.collect();
        }
        (want, live) => *live = want.clone(),
    }
}

/// Lays `over` on `base`: objects field by field, keyed lists element by element, everything else replaced. A null
/// removes the field.
pub fn overlay(base: &mut Value, over: &Value) {
    if base.is_null() && over.is_object() {
        *base = Value::Object(Map::new());
    }
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (name, field) in over {
                match field {
                    Value::Null => {
                        base.shift_remove(name);
                    }
                    field => overlay(base.entry(name.clone()).or_insert(Value::Null), field),
                }
            }
        }
        (Value::Array(base), Value::Array(over))
            if !over.is_empty() && list_key(over).is_some() =>
        {
            let key = list_key(over).expect("the guard found one");
            for item in over {
                match base.iter_mut().find(|other| other.get(key) == Some(&item[key])) {
                    Some(other) => overlay(other, item),
                    None => base.push(item.clone()),
                }
            }
        }
        (base, over) => *base = over.clone(),
    }
}

/// `sent` in the form in which the API server answered it, so that what we keep can be compared with what it stores:
/// quantities and numbers as it writes them, fields it dropped left out.
pub fn settled(sent: &Value, answered: &Value) -> Value {
    match (sent, answered) {
        (Value::Object(sent), Value::Object(answered)) => {
            let kept = sent.iter().filter_map(|(name, field)| {
                answered.get(name).map(|other| (name.clone(), settled(field, other)))
            });
            Value::Object(kept.collect::<Map<_, _>>())
        }
        (Value::Array(sent), Value::Array(answered)) => match list_key(sent) {
            Some(key) => sent
                .iter()
                .filter_map(|item| {
                    find(answered, key, &item[key]).map(|other| settled(item, other))
                })
                .collect(),
            None if sent.len() == answered.len() => {
                sent.iter().zip(answered).map(|(item, other)| settled(item, other)).collect()
            }
            None => Value::Array(answered.clone()),
        },
        (_, answered) => answered.clone(),
    }
}

/// The first `digits` hexadecimal digits of the SHA-256 of `value`, whatever the order of its fields.
pub fn digest(value: &Value, digits: usize) -> String {
    let mut text = String::new();
    canonical(value, &mut text);
    let hash = Sha256::digest(text.as_bytes());
    let mut hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    hex.truncate(digits);
    hex
}

fn canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(fields) => {
            let mut names: Vec<&String> = fields.keys().collect();
            names.sort();
            out.push('{');
            for name in names {
                out.push_str(&Value::from(name.as_str()).to_string());
                out.push(':');
                canonical(&fields[name], out);
                out.push(',');
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for item in items {
                canonical(item, out);
                out.push(',');
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// The merge key that every element carries.
fn list_key(items: &[Value]) -> Option<&'static str> {
    let carried = |key: &&&str| items.iter().all(|item| item.get(**key).is_some());
    (!items.is_empty()).then(|| LIST_KEYS.iter().find(carried).copied()).flatten()
}

fn find<'a>(items: &'a [Value], key: &str, value: &Value) -> Option<&'a Value> {
    items.iter().find(|item| item.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_and_elements_of_others_do_not_differ() {
        let want =
            json!({"spec": {"replicas": 2, "containers": [{"name": "engine", "image": "a"}]}});
        let live = json!({"metadata": {"uid": "1"}, "spec": {"replicas": 2, "paused": false,
            "containers": [{"name": "mesh"}, {"name": "engine", "image": "a", "imagePullPolicy": "Always"}]}});
        assert!(!differs(&want, &live));
    }

    #[test]
    fn a_changed_a_missing_and_a_shortened_value_differ() {
        let want =
            json!({"args": ["--a", "--b"], "image": "a", "env": [{"name": "X", "value": "1"}]});
        for live in [
            json!({"args": ["--a", "--b"], "image": "b", "env": [{"name": "X", "value": "1"}]}),
            json!({"args": ["--a", "--b"], "image": "a", "env": [{"name": "Y", "value": "1"}]}),
            json!({"args": ["--a"], "image": "a", "env": [{"name": "X", "value": "1"}]}),
            json!({"args": ["--b", "--a"], "image": "a", "env": [{"name": "X", "value": "1"}]}),
            json!({"image": "a"}),
        ] {
            assert!(differs(&want, &live), "{live}");
        }
    }

    #[test]
    fn the_first_field_that_differs_is_named_by_its_path() {
        let want = json!({"spec": {"replicas": 2, "ports": [{"name": "http", "port": 80}], "args": ["a"]}});
        for (live, path) in [
            (json!({"spec": {"replicas": 5, "ports": []}}), "spec.replicas"),
            (
                json!({"spec": {"replicas": 2, "ports": [{"name": "http", "port": 81}]}}),
                "spec.ports[http].port",
            ),
            (json!({"spec": {"replicas": 2, "ports": []}}), "spec.ports[http]"),
            (
                json!({"spec": {"replicas": 2, "ports": want["spec"]["ports"], "args": []}}),
                "spec.args",
            ),
            (json!({}), "spec"),
        ] {
            assert_eq!(difference(&want, &live).as_deref(), Some(path), "{live}");
        }
        assert_eq!(difference(&want, &want), None);
    }

    #[test]
    fn an_overlay_reaches_one_container_by_name_and_null_removes() {
        let mut base = json!({"spec": {"hostname": "x", "containers": [{"name": "engine", "image": "a",
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}]}});
        let over = json!({"metadata": {"labels": {"team": "a"}}, "spec": {"hostname": null, "containers": [
            {"name": "engine", "volumeMounts": [{"name": "more", "mountPath": "/more"}]}, {"name": "side", "image": "b"}]}});
        overlay(&mut base, &over);
        assert_eq!(
            base,
            json!({"spec": {"containers": [{"name": "engine", "image": "a", "volumeMounts": [
                {"name": "tmp", "mountPath": "/tmp"}, {"name": "more", "mountPath": "/more"}]},
                {"name": "side", "image": "b"}]}, "metadata": {"labels": {"team": "a"}}})
        );
    }

    #[test]
    fn imposing_keeps_what_others_added_but_no_stranger_in_our_lists() {
        let want = json!({"ports": [{"name": "http", "port": 80}], "type": "ClusterIP"});
        let mut live = json!({"clusterIP": "10.0.0.1", "type": "NodePort", "ports": [
            {"name": "http", "port": 81, "protocol": "TCP"}, {"name": "more", "port": 9}]});
        impose(&want, &mut live);
        assert_eq!(
            live,
            json!({"clusterIP": "10.0.0.1", "type": "ClusterIP",
                "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]})
        );
    }

    #[test]
    fn what_the_server_normalises_is_kept_as_it_answers() {
        let sent = json!({"cpu": "1000m", "gone": [], "env": [{"name": "A", "value": "1"}]});
        let answered =
            json!({"cpu": "1", "env": [{"name": "A", "value": "1", "x": 1}], "defaulted": true});
        let kept = settled(&sent, &answered);
        assert_eq!(kept, json!({"cpu": "1", "env": [{"name": "A", "value": "1"}]}));
        assert!(!differs(&kept, &answered));
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-z]{0,4}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-e]", inner), 0..4)
                    .prop_map(|fields| fields.into_iter().collect::<Map<_, _>>().into()),
            ]
        })
    }

    proptest! {
        #[test]
        fn nothing_differs_from_itself_nor_from_itself_under_an_overlay_of_itself(value in json_value()) {
            prop_assert!(!differs(&value, &value));
            let mut twice = value.clone();
            overlay(&mut twice, &value);
            prop_assert_eq!(&twice, &value);
            let mut imposed = value.clone();
            impose(&value, &mut imposed);
            prop_assert_eq!(&imposed, &value);
            prop_assert_eq!(settled(&value, &value), value);
        }

        #[test]
        fn nothing_differs_after_imposing(want in json_value(), mut live in json_value()) {
            impose(&want, &mut live);
            prop_assert!(!differs(&want, &live));
        }

        #[test]
        fn a_digest_ignores_the_order_of_fields(mut fields in prop::collection::vec(("[a-z]{1,3}", json_value()), 0..6)) {
            let one: Map<_, _> = fields.iter().cloned().collect();
            fields.reverse();
            let mut other: Map<_, _> = Map::new();
            for (name, _) in fields {
                let value = one[&name].clone();
                other.insert(name, value);
            }
            prop_assert_eq!(digest(&one.into(), 64), digest(&other.into(), 64));
        }
    }
}
