//! In: whose it is, the pod template of its revision, whom the spec lets in, where models are downloaded from. Out: the
//! NetworkPolicy of the engine's pods: requests come in on one port, names are asked for, and what a pod downloads itself
//! may come; nothing else leaves. And that of pods that look at a model, whom nobody asks anything. Policies add up: who needs more writes another one for the same pods.

use k8s_openapi::api::networking::v1::NetworkPolicy;
use plimsoll_crds::Clients;
use serde_json::{Value, json};

use super::{Identity, Settings, model, names};
use crate::apply::Want;
use crate::spec::Source;

const PORT_DNS: u16 = 53;
const PORT_HTTPS: u16 = 443;
const PORT_HTTP: u16 = 80;

pub fn network_policy(
    identity: &Identity,
    pod_template: &Value,
    clients: Clients,
    settings: &Settings,
) -> Want<NetworkPolicy> {
    let mut ingress = json!({"ports": [{"port": names::PORT_ENGINE, "protocol": "TCP"}]});
    // Without `from`, everyone.
    match clients {
        Clients::Anyone => {}
        Clients::Cluster => ingress["from"] = json!([{"namespaceSelector": {}}]),
        Clients::Namespace => {
            let invited = json!({"matchLabels": {names::CLIENTS: "true"}});
            ingress["from"] = json!([
                {"podSelector": {}},
                {"namespaceSelector": invited},
                operators(&settings.home),
            ]);
        }
    }
    Want::new(json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": identity.metadata(),
        "spec": {
            "podSelector": {"matchLabels": names::selector(&identity.name)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [ingress],
            "egress": egress(downloads(pod_template), settings),
        },
    }))
}

/// Of the pods of an inspect Job: nobody is let in.
pub fn of_inspect(
    namespace: &str,
    key: &str,
    owners: &[Value],
    source: &Source,
    settings: &Settings,
) -> Want<NetworkPolicy> {
    Want::new(json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": model::shared(namespace, &names::inspect_job(key), key, owners),
        "spec": {
            "podSelector": {"matchLabels": names::model_labels(key)},
            "policyTypes": ["Ingress", "Egress"],
            "egress": egress(matches!(source, Source::Hub { .. }), settings),
        },
    }))
}

/// Where pods may go. Whoever answers for names may be a pod, or the node itself on an address that no selector meets.
fn egress(downloads: bool, settings: &Settings) -> Vec<Value> {
    let mut egress = vec![json!({"ports": [
        {"port": PORT_DNS, "protocol": "UDP"}, {"port": PORT_DNS, "protocol": "TCP"},
    ]})];
    if downloads {
        let port = settings.hub_endpoint.as_deref().map_or(PORT_HTTPS, port_of);
        egress.push(json!({"ports": [{"port": port, "protocol": "TCP"}]}));
    }
    egress
}

/// The operator itself, which asks engines what they measure.
fn operators(home: &str) -> Value {
    json!({
        "namespaceSelector": {"matchLabels": {names::NAMESPACE_NAME: home}},
        "podSelector": {"matchLabels": {names::APP_NAME: names::OPERATOR}},
    })
}

/// Whether a pod of this template brings its model itself.
fn downloads(pod_template: &Value) -> bool {
    let containers = pod_template["spec"]["initContainers"].as_array();
    containers.into_iter().flatten().any(|container| container["name"] == names::FETCH)
}

/// The port of `http://HOST:PORT/…`, or that of its scheme.
fn port_of(endpoint: &str) -> u16 {
    let (scheme, rest) = endpoint.split_once("://").unwrap_or(("https", endpoint));
    let host = rest.split('/').next().unwrap_or_default();
    let given = host.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    given.unwrap_or(if scheme == "http" { PORT_HTTP } else { PORT_HTTPS })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(template: Value, clients: Clients, hub: Option<&str>) -> Value {
        let identity =
            Identity { namespace: "team".into(), name: "assistant".into(), uid: "u".into() };
        let hub_endpoint = hub.map(str::to_owned);
        let settings = Settings { hub_endpoint, ..super::super::tests::settings() };
        network_policy(&identity, &template, clients, &settings).body["spec"].clone()
    }

    #[test]
    fn requests_come_in_on_one_port_from_whom_the_spec_says() {
        let port = json!([{"port": 8000, "protocol": "TCP"}]);
        for (clients, from) in [
            (Clients::Anyone, Value::Null),
            (Clients::Cluster, json!([{"namespaceSelector": {}}])),
            (
                Clients::Namespace,
                json!([{"podSelector": {}},
                    {"namespaceSelector": {"matchLabels": {"plimsoll.dev/clients": "true"}}},
                    {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "plimsoll-system"}},
                        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "plimsoll-operator"}}}]),
            ),
        ] {
            let spec = policy(json!({}), clients, None);
            assert_eq!(spec["ingress"].as_array().unwrap().len(), 1);
            assert_eq!((&spec["ingress"][0]["ports"], &spec["ingress"][0]["from"]), (&port, &from));
            assert_eq!(spec["policyTypes"], json!(["Ingress", "Egress"]));
        }
    }

    #[test]
    fn only_a_pod_that_downloads_reaches_more_than_names() {
        let dns = json!({"ports": [
            {"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]});
        let reads = policy(json!({"spec": {}}), Clients::Cluster, None);
        assert_eq!(reads["egress"], json!([dns]));
        let fetches = json!({"spec": {"initContainers": [{"name": "mesh"}, {"name": "fetch"}]}});
        for (hub, port) in [
            (None, 443),
            (Some("https://mirror.example/hub"), 443),
            (Some("http://mirror.example"), 80),
            (Some("http://192.0.2.1:8300/x"), 8300),
        ] {
            let egress = policy(fetches.clone(), Clients::Cluster, hub)["egress"].clone();
            let download = json!({"ports": [{"port": port, "protocol": "TCP"}]});
            assert_eq!(egress, json!([dns, download]), "{hub:?}");
        }
        let inspect = |source: Source| {
            let settings = Settings { hub_endpoint: None, ..super::super::tests::settings() };
            of_inspect("team", "k", &[], &source, &settings).body["spec"].clone()
        };
        let claim = inspect(Source::Claim { name: "models".into(), path: String::new() });
        assert_eq!((&claim["ingress"], &claim["egress"]), (&Value::Null, &json!([dns])));
        let hub = inspect(Source::Hub { repo: "org/model".into(), revision: "main".into() });
        let download = json!({"ports": [{"port": 443, "protocol": "TCP"}]});
        assert_eq!(hub["egress"], json!([dns, download]));
    }
}
