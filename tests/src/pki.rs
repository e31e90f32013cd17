//! Certificates and keys of one control plane.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

/// Paths of PEM files.
#[derive(Debug)]
pub(crate) struct Pki {
    pub(crate) ca: PathBuf,
    pub(crate) server_certificate: PathBuf,
    pub(crate) server_key: PathBuf,
    /// Signs the tokens of service accounts.
    pub(crate) account_key: PathBuf,
    /// Checks them.
    pub(crate) account_public_key: PathBuf,
}

impl Pki {
    /// Makes all of it in `dir`. Keys are ECDSA P-256.
    pub(crate) fn generate(dir: &Path) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "altiplano-tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;

        let names = ["127.0.0.1", "10.96.0.1", "localhost", "kubernetes.default.svc"].map(String::from);
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let server_key = KeyPair::generate()?;
        let server = params.signed_by(&server_key, &ca)?;
        let account_key = KeyPair::generate()?;

        let write = |name: &str, content: String| -> Result<PathBuf> {
            let path = dir.join(name);
            std::fs::write(&path, content).with_context(|| format!("could not write {}", path.display()))?;
            Ok(path)
        };
        Ok(Self {
            ca: write("ca.crt", ca.pem())?,
            server_certificate: write("apiserver.crt", server.pem())?,
            server_key: write("apiserver.key", server_key.serialize_pem())?,
            account_key: write("sa.key", account_key.serialize_pem())?,
            account_public_key: write("sa.pub", account_key.public_key_pem())?,
        })
    }
}
