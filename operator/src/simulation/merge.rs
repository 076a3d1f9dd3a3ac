//! In: an object, what a manager applied before, what it applies now. Out: the object as the API server would store it.
//! Written from the API's documentation and without a line of `fields`, which it judges.

use serde_json::{Map, Value};

/// Server-side apply with one manager and force: fields it no longer sends go, those it sends are set, others stay.
pub fn apply(live: &Value, before: &Value, want: &Value) -> Value {
    let mut merged = live.clone();
    forget(&mut merged, before, want);
    set(&mut merged, want);
    merged
}

/// RFC 7386.
pub fn patch(live: &mut Value, patch_: &Value) {
    let Value::Object(fields) = patch_ else {
        *live = patch_.clone();
        return;
    };
    if !live.is_object() {
        *live = Value::Object(Map::new());
    }
    let held = live.as_object_mut().expect("made one above");
    for (name, field) in fields {
        if field.is_null() {
            held.shift_remove(name);
        } else {
            patch(held.entry(name.clone()).or_insert(Value::Null), field);
        }
    }
}

/// Takes out what `before` had and `want` has not.
fn forget(live: &mut Value, before: &Value, want: &Value) {
    match (live, before) {
        (Value::Object(live), Value::Object(before)) => {
            for (name, field) in before {
                let Some(held) = live.get_mut(name) else { continue };
                match (want.get(name), field) {
                    (Some(wanted), _) => forget(held, field, wanted),
                    (None, Value::Object(_)) => {
                        forget(held, field, &Value::Null);
                        if held.as_object().is_some_and(Map::is_empty) {
                            live.shift_remove(name);
                        }
                    }
                    (None, _) => {
                        live.shift_remove(name);
                    }
                }
            }
        }
        (Value::Array(live), Value::Array(before)) => {
            let Some(key) = list_key(before) else { return };
            let wanted = |item: &Value| find(want.as_array()?, key, &item[key]).cloned();
            for item in before.iter().filter(|item| wanted(item).is_none()) {
                live.retain(|held| held[key] != item[key]);
            }
            for held in live {
                if let Some(wanted) = wanted(held)
                    && let Some(item) = find(before, key, &wanted[key])
                {
                    forget(held, item, &wanted);
                }
            }
        }
        _ => {}
    }
}

fn set(live: &mut Value, want: &Value) {
    match (live, want) {
        (Value::Object(live), Value::Object(want)) => {
            for (name, field) in want {
                set(live.entry(name.clone()).or_insert(Value::Null), field);
            }
        }
        (Value::Array(live), Value::Array(want)) if list_key(want).is_some() => {
            let key = list_key(want).expect("the guard found one");
            for item in want {
                match live.iter_mut().find(|held| held[key] == item[key]) {
                    Some(held) => set(held, item),
                    None => live.push(item.clone()),
                }
            }
        }
        (live, want) => *live = want.clone(),
    }
}

fn find<'a>(items: &'a [Value], key: &str, value: &Value) -> Option<&'a Value> {
    items.iter().find(|item| &item[key] == value)
}

/// The key of a list whose elements are merged, told from its elements as far as our objects have such lists.
fn list_key(items: &[Value]) -> Option<&'static str> {
    let all = |key: &str| items.iter().all(|item| item.get(key).is_some());
    let by = |key: &'static str, also: &str| (all(key) && all(also)).then_some(key);
    if items.is_empty() {
        return None;
    }
    by("uid", "kind")
        .or(by("mountPath", "mountPath"))
        .or(by("containerPort", "protocol"))
        .or(by("port", "protocol"))
        .or(by("type", "status"))
        .or(by("name", "name"))
}

/// What the API server makes of a pod's spec: defaults filled in, quantities written its way, empty lists left out.
pub fn settle_pod(spec: &mut Value) {
    let Some(fields) = spec.as_object_mut() else { return };
    fields.retain(|_, field| !field.as_array().is_some_and(Vec::is_empty));
    for (name, value) in [("restartPolicy", "Always"), ("dnsPolicy", "ClusterFirst")] {
        fields.entry(name).or_insert(value.into());
    }
    for list in ["containers", "initContainers"] {
        for container in fields.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let container = container.as_object_mut().expect("a container is an object");
            container.retain(|_, field| !field.as_array().is_some_and(Vec::is_empty));
            container.entry("imagePullPolicy").or_insert("IfNotPresent".into());
            container.entry("terminationMessagePolicy").or_insert("File".into());
            for side in ["requests", "limits"] {
                let amounts = container.get_mut("resources").and_then(|both| both.get_mut(side));
                for amount in amounts.and_then(Value::as_object_mut).into_iter().flatten() {
                    *amount.1 = settle_quantity(amount.1);
                }
            }
        }
    }
}

/// `1000m` is stored as `1`, `2048Mi` as `2Gi`.
fn settle_quantity(amount: &Value) -> Value {
    let Some(text) = amount.as_str() else { return amount.to_string().into() };
    let whole =
        |text: &str, of: u64| text.parse::<u64>().ok().filter(|n| n % of == 0).map(|n| n / of);
    if let Some(units) = text.strip_suffix('m').and_then(|millis| whole(millis, 1000)) {
        return units.to_string().into();
    }
    for (small, large) in [("Ki", "Mi"), ("Mi", "Gi")] {
        if let Some(more) = text.strip_suffix(small).and_then(|amount| whole(amount, 1024)) {
            return settle_quantity(&format!("{more}{large}").into());
        }
    }
    amount.clone()
}
