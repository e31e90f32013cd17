//! Sources on the node's own disk.

use std::os::unix::fs::symlink;

use super::*;

struct Files {
    fixture: Fixture,
    /// `models/` is a root, `private/` is not.
    dir: TempDir,
    sha256: String,
}

impl Files {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (body, sha256) = model();
        for name in ["models", "private", "models/sub"] {
            std::fs::create_dir(dir.path().join(name)).expect("made");
        }
        for name in ["models/m.gguf", "private/m.gguf", "models/sub/with space.gguf"] {
            std::fs::write(dir.path().join(name), &body).expect("written");
        }
        symlink(dir.path().join("private/m.gguf"), dir.path().join("models/out.gguf")).expect("linked");
        symlink(dir.path().join("models/m.gguf"), dir.path().join("private/in.gguf")).expect("linked");
        let root = dir.path().join("models");
        Self { fixture: Fixture::with(|config| config.file_roots = vec![root]).await, dir, sha256 }
    }

    fn uri(&self, name: &str) -> String {
        format!("file://{}/{name}", self.dir.path().display())
    }

    async fn reason(&self, name: &str) -> &'static str {
        self.fixture.ensure(&source(&self.uri(name))).await.expect_err("refused").reason()
    }
}

#[tokio::test]
async fn files_below_a_root_are_used_where_they_are() {
    let files = Files::new().await;
    for name in ["models/m.gguf", "models/sub/with%20space.gguf", "private/in.gguf"] {
        let source = source(&files.uri(name));
        assert!(files.fixture.store.has(&source).await, "{name}");
        let stored = files.fixture.ensure(&source).await.expect("there");
        assert!(stored.path.starts_with(files.dir.path().canonicalize().expect("real").join("models")), "{stored:?}");
        assert_eq!(stored.sha256, None, "nobody asked for it");
        assert_eq!(stored.header.architecture, "llama");
    }
    assert!(files.fixture.files().is_empty(), "nothing is copied");
}

#[tokio::test]
async fn what_is_outside_the_roots_is_refused_however_it_is_written() {
    let files = Files::new().await;
    for name in ["private/m.gguf", "models/../private/m.gguf", "models/out.gguf", "models/%2e%2e/private/m.gguf"] {
        assert_eq!(files.reason(name).await, "PathNotAllowed", "{name}");
    }
    assert_eq!(files.reason("private/none.gguf").await, "PathNotAllowed", "not even its absence is told");
    assert_eq!(files.reason("models/none.gguf").await, "FileNotFound");
    assert_eq!(files.reason("models/sub").await, "InvalidSource", "a directory");
    let error = files.fixture.ensure(&source("file://elsewhere/models/m.gguf")).await.expect_err("refused");
    assert_eq!(error.reason(), "InvalidSource", "another host");
}

#[tokio::test]
async fn digests_are_checked_and_a_changed_file_is_hashed_again() {
    let files = Files::new().await;
    let pinned = Source { sha256: Some(files.sha256.clone()), ..source(&files.uri("models/m.gguf")) };
    let stored = files.fixture.ensure(&pinned).await.expect("there");
    assert_eq!(stored.sha256.as_ref(), Some(&files.sha256));

    let other = Source { sha256: Some("0".repeat(64)), ..pinned.clone() };
    let error = files.fixture.ensure(&other).await.expect_err("another file");
    assert_eq!(error.reason(), "ChecksumMismatch");
    assert!(error.detail().contains(&files.sha256), "{}", error.detail());

    let mut body = std::fs::read(&stored.path).expect("read");
    *body.last_mut().expect("not empty") ^= 1;
    std::fs::write(&stored.path, body).expect("written");
    assert_eq!(files.fixture.ensure(&pinned).await.expect_err("changed").reason(), "ChecksumMismatch");
}

#[tokio::test]
async fn bad_files_are_refused_and_recover_when_they_are_replaced() {
    use altiplano_test_models::BadFile;
    let files = Files::new().await;
    let path = files.dir.path().join("models/bad.gguf");
    for (kind, reason) in [
        (BadFile::NotGguf, "NotGGUF"),
        (BadFile::Empty, "NotGGUF"),
        (BadFile::Truncated, "FileTruncated"),
        (BadFile::TruncatedHeader, "FileTruncated"),
        (BadFile::CorruptHeader, "CorruptHeader"),
        (BadFile::NoLayers, "CorruptHeader"),
        (BadFile::UnknownVersion, "UnsupportedFormat"),
    ] {
        kind.write(&Spec::default(), &path).expect("written");
        assert_eq!(files.reason("models/bad.gguf").await, reason, "{kind:?}");
    }
    Spec::default().write(&path).expect("written");
    files.fixture.ensure(&source(&files.uri("models/bad.gguf"))).await.expect("recovered");
}
