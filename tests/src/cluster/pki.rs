//! Certificates of one cluster.
//!
//! In: names and addresses. Out: files in the cluster's `pki` folder and kubeconfigs that point to
//! them. Never outlives the cluster: every start makes a new authority.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType,
};
use serde_json::json;

/// The certificate authority of one cluster, and the folder it writes to.
pub struct Authority {
    folder: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// Files of one issued certificate.
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// A fresh authority with its certificate at `ca.crt`, and the key pair `sa.key`, `sa.pub` that
    /// signs service account tokens.
    pub fn create(folder: &Path) -> Result<Authority> {
        std::fs::create_dir_all(folder)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "plimsoll tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        std::fs::write(folder.join("ca.crt"), issuer.pem())?;
        let tokens = KeyPair::generate()?;
        std::fs::write(folder.join("sa.key"), tokens.serialize_pem())?;
        std::fs::write(folder.join("sa.pub"), tokens.public_key_pem())?;
        Ok(Authority { folder: folder.into(), issuer })
    }

    /// The path of one of the authority's own files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A client certificate: Kubernetes reads the user from the common name and the group from the
    /// organisation.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Identity> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(&user.replace(':', "-"), params)
    }

    /// A serving certificate for an address list and DNS names.
    pub fn server(&self, name: &str, addresses: &[IpAddr], dns: &[&str]) -> Result<Identity> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        for address in addresses {
            params.subject_alt_names.push(SanType::IpAddress(*address));
        }
        for host in dns {
            params.subject_alt_names.push(SanType::DnsName((*host).try_into()?));
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(name, params)
    }

    /// Issues a client certificate and writes `USER.kubeconfig` for it beside the `pki` folder.
    pub fn kubeconfig(&self, server: &str, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let identity = self.client(user, group)?;
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": user}}],
            "clusters": [{"name": "tests", "cluster": {
                "server": server, "certificate-authority": self.file("ca.crt")}}],
            "users": [{"name": user, "user": {
                "client-certificate": identity.certificate, "client-key": identity.key}}],
        });
        let parent = self.folder.parent().context("the pki folder lies in a cluster's folder")?;
        let path = parent.join(format!("{}.kubeconfig", user.replace(':', "-")));
        std::fs::write(&path, serde_yaml_ng::to_string(&config)?)?;
        Ok(path)
    }

    fn issue(&self, file: &str, params: CertificateParams) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let identity = Identity {
            certificate: self.file(&format!("{file}.crt")),
            key: self.file(&format!("{file}.key")),
        };
        std::fs::write(&identity.certificate, certificate.pem())?;
        std::fs::write(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }
}
