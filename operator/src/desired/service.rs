//! In: whose it is. Out: the Service clients talk to, and the account the pods run under. Never here: a choice.

use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use serde_json::json;

use super::{Identity, names};
use crate::apply::Want;

/// Port 80 of `NAME.NAMESPACE.svc` leads to the engine pods that are ready.
pub fn service(identity: &Identity) -> Want<Service> {
    Want::new(json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": identity.metadata(),
        "spec": {
            "type": "ClusterIP",
            "selector": names::selector(&identity.name),
            "ports": [{
                "name": names::PORT_NAME,
                "port": names::PORT_SERVICE,
                "targetPort": names::PORT_NAME,
                "protocol": "TCP",
            }],
        },
    }))
}

/// Engine pods ask nothing of the API server, so their account carries no token.
pub fn service_account(identity: &Identity) -> Want<ServiceAccount> {
    Want::new(json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": identity.metadata(),
        "automountServiceAccountToken": false,
    }))
}
