//! Tokens as pods have them: bound to a Pod object, with the name of its node in them.

use anyhow::{Context as _, Result};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{Container, Pod, PodSpec, ServiceAccount},
};
use kube::{
    Api,
    api::{DeleteParams, ObjectMeta, PostParams},
};

use crate::{ControlPlane, sandbox};

/// A Pod object and a token bound to it. The token dies with the Pod.
#[derive(Clone, Debug)]
pub struct PodIdentity {
    /// Namespace of Pod and service account.
    pub namespace: String,
    /// Name of the Pod.
    pub pod: String,
    /// UID of the Pod.
    pub uid: String,
    /// A bearer token.
    pub token: String,
}

impl ControlPlane {
    /// Makes a Pod of service account `account` (on node `node` if one is given: then the token names the node) and
    /// a token bound to it, good for a day. The Pod's name begins with `prefix`.
    pub async fn pod_identity(
        &self,
        namespace: &str,
        account: &str,
        prefix: &str,
        node: Option<&str>,
    ) -> Result<PodIdentity> {
        let client = self.client().await?;
        let name = format!("{prefix}-{}", &sandbox::random_hex()?[..8]);
        let pod = Pod {
            metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
            spec: Some(PodSpec {
                service_account_name: Some(account.to_owned()),
                node_name: node.map(str::to_owned),
                // Nobody starts it: the process beside it is what it stands for.
                containers: vec![Container {
                    name: "main".into(),
                    image: Some("registry.invalid/none:0".into()),
                    ..Container::default()
                }],
                ..PodSpec::default()
            }),
            status: None,
        };
        let pods = Api::<Pod>::namespaced(client, namespace);
        let created = pods.create(&PostParams::default(), &pod).await.context("could not create the agent's Pod")?;
        let uid = created.metadata.uid.context("a Pod without UID")?;
        self.identity_of(namespace, account, &name, &uid).await
    }

    /// A token of a Pod that is there, as its kubelet would ask for it.
    pub async fn identity_of(&self, namespace: &str, account: &str, name: &str, uid: &str) -> Result<PodIdentity> {
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: Vec::new(),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: Some(name.to_owned()),
                    uid: Some(uid.to_owned()),
                }),
                expiration_seconds: Some(24 * 60 * 60),
            },
            ..TokenRequest::default()
        };
        let accounts = Api::<ServiceAccount>::namespaced(self.client().await?, namespace);
        let answer = accounts.create_token_request(account, &PostParams::default(), &request).await?;
        let token = answer.status.context("a TokenRequest without answer")?.token;
        Ok(PodIdentity { namespace: namespace.to_owned(), pod: name.to_owned(), uid: uid.to_owned(), token })
    }

    /// Deletes the Pod at once, as nobody is there to end it gracefully.
    pub async fn delete_pod(&self, identity: &PodIdentity) -> Result<()> {
        let pods = Api::<Pod>::namespaced(self.client().await?, &identity.namespace);
        pods.delete(&identity.pod, &DeleteParams::default().grace_period(0)).await?;
        Ok(())
    }
}
