//! The API server alone: what operator tests stand on.

use plimsoll_tests::cluster::shared_api_server;

#[test]
fn objects_are_kept_and_writes_are_counted_by_user() {
    let Some(server) = shared_api_server() else { return };
    let config = server.kubeconfig_for("writer", Some("system:masters")).unwrap();
    let writer = server.kubectl().with_kubeconfig(&config);
    writer.run(&["create", "configmap", "kept", "--from-literal=a=b"]).unwrap();
    let kept = server.kubectl().get(&["configmap", "kept"]).unwrap();
    assert_eq!(kept["data"]["a"], "b");
    let writes = server.writes_by("writer").unwrap();
    assert_eq!(writes.len(), 1, "{writes:?}");
    let write = &writes[0];
    assert_eq!((write.verb.as_str(), write.resource.as_str()), ("create", "configmaps"));
    assert_eq!((write.name.as_str(), write.code), ("kept", 201));
}

#[test]
fn a_user_without_rights_is_refused() {
    let Some(server) = shared_api_server() else { return };
    let config = server.kubeconfig_for("nobody", None).unwrap();
    let error = server.kubectl().with_kubeconfig(&config).get(&["pods"]).unwrap_err();
    assert!(error.to_string().contains("Forbidden"), "{error}");
}
