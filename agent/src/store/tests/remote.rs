//! Sources behind HTTP.

use super::origin::{Fault, Origin, Seen};
use super::*;

fn get(range: Option<&str>, if_range: Option<&str>) -> Seen {
    Seen { method: "GET".to_owned(), range: range.map(str::to_owned), if_range: if_range.map(str::to_owned) }
}

#[tokio::test]
async fn a_file_is_fetched_once_and_then_there() {
    let (body, sha256) = model();
    let origin = Origin::serving(body.clone()).await;
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    assert!(!fixture.store.has(&source).await);

    let progress = watch::Sender::new(Progress::default());
    let first = fixture.store.ensure(&source, &progress, &CancellationToken::new()).await.expect("fetched");
    assert_eq!(std::fs::read(&first.path).expect("read"), body);
    assert_eq!(first.sha256.as_deref(), Some(sha256.as_str()));
    assert_eq!(first.size_bytes, body.len() as u64);
    assert_eq!(first.header.architecture, "llama");
    let length = Some(body.len() as u64);
    assert_eq!(*progress.borrow(), Progress { bytes_done: body.len() as u64, bytes_total: length });
    assert_eq!(fixture.files(), ["gguf", "json"]);
    assert!(fixture.store.has(&source).await);
    let usage = fixture.store.usage().await.expect("counted");
    assert_eq!(usage.used_bytes, body.len() as u64);
    assert!(usage.capacity_bytes > usage.used_bytes);

    assert_eq!(fixture.ensure(&source).await.expect("there"), first);
    assert_eq!(origin.seen().len(), 1, "the second time asks nobody");

    let next = Source { revision: Some("v2".to_owned()), ..source.clone() };
    fixture.ensure(&next).await.expect("fetched");
    assert_eq!(origin.seen().len(), 2, "another revision is another file");

    assert!(fixture.store.remove(&source).await.expect("removed"));
    assert!(!fixture.store.remove(&source).await.expect("nothing left"));
    assert!(!first.path.exists());
    assert_eq!(fixture.files(), ["gguf", "json"], "the other revision stays");
}

/// What stands in for a file that is not here is as long and begins as it does.
#[tokio::test]
async fn a_header_comes_without_its_file() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("m.gguf");
    Spec { layers: 8, embd: 512, heads: 8, ff: 2048, ..Spec::default() }.write(&path).expect("written");
    let body = std::fs::read(path).expect("read");
    let origin = Origin::serving(body.clone()).await;
    // Or all of it would be on its way before anybody can say that it is not wanted.
    origin.pace(Duration::from_millis(20));
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    let peeked = fixture.store.peek(&source).await.expect("peeked").expect("short enough");
    assert_eq!((peeked.size_bytes, peeked.sha256.as_deref()), (body.len() as u64, None));
    assert!(origin.bytes_sent() < body.len() / 2, "{} of {}", origin.bytes_sent(), body.len());
    let stand_in = std::fs::read(&peeked.path).expect("read");
    assert_eq!(stand_in.len(), body.len());
    assert_eq!(stand_in[..1 << 16], body[..1 << 16]);
    assert!(!fixture.store.has(&source).await, "it is not the file");
    assert_eq!(fixture.store.usage().await.expect("counted").used_bytes, 0);

    origin.pace(Duration::ZERO);
    let whole = fixture.ensure(&source).await.expect("fetched");
    assert_eq!(whole.header, peeked.header);
    assert_eq!(fixture.files(), ["gguf", "json"], "the stand-in is gone");
    assert_eq!(fixture.store.peek(&source).await.expect("there"), Some(whole), "the file is better than its header");
    let local = Source { uri: url::Url::from_file_path("/nowhere").expect("a path").into(), ..source };
    assert_eq!(fixture.store.peek(&local).await.expect_err("no root").reason(), "PathNotAllowed");

    let nothing = Origin::serving(b"no model at all".to_vec()).await;
    let refused = fixture.store.peek(&super::source(&nothing.url())).await.expect_err("no GGUF");
    assert_eq!(refused.reason(), "NotGGUF", "{refused}");
}

#[tokio::test]
async fn a_cut_download_goes_on_where_it_ended() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.fail([Fault::CutAfter(100_000), Fault::CutAfter(50_000)]);
    let fixture = Fixture::new().await;
    let stored = fixture.ensure(&source(&origin.url())).await.expect("fetched");
    assert_eq!(std::fs::read(stored.path).expect("read"), body);
    let expected =
        [get(None, None), get(Some("bytes=100000-"), Some("\"one\"")), get(Some("bytes=150000-"), Some("\"one\""))];
    assert_eq!(origin.seen(), expected);
    assert_eq!(origin.bytes_sent(), body.len(), "no byte twice");
}

#[tokio::test]
async fn attempts_end_and_the_next_call_goes_on() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.fail([Fault::CutAfter(10_000), Fault::CutAfter(10_000), Fault::CutAfter(10_000)]);
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    let error = fixture.ensure(&source).await.expect_err("cut three times");
    assert_eq!(error.reason(), "DownloadIncomplete");
    assert_eq!(error.detail(), format!("the download ended early: 30000 of {} bytes", body.len()));
    assert_eq!(fixture.files(), ["partial", "partial.json"]);
    let stored = fixture.ensure(&source).await.expect("fetched");
    assert_eq!(std::fs::read(stored.path).expect("read"), body);
    assert_eq!(origin.seen().last(), Some(&get(Some("bytes=30000-"), Some("\"one\""))));
}

#[tokio::test]
async fn a_silent_connection_is_given_up_and_resumed() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.fail([Fault::StallAfter(64 << 10)]);
    let fixture = Fixture::with(|config| config.stall_timeout = Duration::from_secs(3)).await;
    let stored = fixture.ensure(&source(&origin.url())).await.expect("fetched");
    assert_eq!(std::fs::read(stored.path).expect("read"), body);
    assert_eq!(origin.seen().last(), Some(&get(Some("bytes=65536-"), Some("\"one\""))));
}

#[tokio::test]
async fn a_file_that_changed_meanwhile_is_taken_anew() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.fail([Fault::CutAfter(50_000), Fault::Status(503), Fault::Status(503)]);
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    fixture.ensure(&source).await.expect_err("cut");
    let mut other = body;
    *other.last_mut().expect("not empty") ^= 1;
    origin.replace(other.clone(), Some("\"two\""));
    let stored = fixture.ensure(&source).await.expect("fetched");
    assert_eq!(std::fs::read(stored.path).expect("read"), other, "not a mixture");
}

#[tokio::test]
async fn bytes_that_nothing_vouches_for_are_not_resumed() {
    let (body, sha256) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.replace(body.clone(), None);
    let fixture = Fixture::new().await;
    let plain = source(&origin.url());
    origin.fail([Fault::CutAfter(50_000)]);
    fixture.ensure(&plain).await.expect("fetched");
    assert_eq!(origin.seen(), [get(None, None), get(None, None)], "neither tag nor digest");

    let pinned = Source { sha256: Some(sha256), ..plain };
    origin.fail([Fault::CutAfter(50_000)]);
    fixture.ensure(&pinned).await.expect("fetched");
    assert_eq!(origin.seen()[2..], [get(None, None), get(Some("bytes=50000-"), None)], "the digest vouches");
}

#[tokio::test]
async fn a_damaged_partial_file_is_found_by_the_digest() {
    let (body, sha256) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.fail([Fault::CutAfter(100_000), Fault::Status(503), Fault::Status(503)]);
    let fixture = Fixture::new().await;
    let source = Source { sha256: Some(sha256), ..source(&origin.url()) };
    fixture.ensure(&source).await.expect_err("cut");
    let partial = std::fs::read_dir(fixture.root.path())
        .expect("listed")
        .map(|e| e.expect("an entry").path())
        .find(|p| p.extension().is_some_and(|e| e == "partial"))
        .expect("a partial file");
    let mut bytes = std::fs::read(&partial).expect("read");
    *bytes.last_mut().expect("not empty") ^= 0xff;
    std::fs::write(&partial, bytes).expect("written");
    let stored = fixture.ensure(&source).await.expect("fetched anew");
    assert_eq!(std::fs::read(stored.path).expect("read"), body);
}

#[tokio::test]
async fn a_whole_partial_file_is_only_checked() {
    let (body, sha256) = model();
    let origin = Origin::serving(body.clone()).await;
    let fixture = Fixture::new().await;
    let source = Source { sha256: Some(sha256), ..source(&origin.url()) };
    let stored = fixture.ensure(&source).await.expect("fetched");
    // As after a crash between the last byte and the rename.
    let key = stored.path.with_extension("");
    std::fs::rename(&stored.path, key.with_extension("partial")).expect("renamed");
    std::fs::rename(key.with_extension("json"), key.with_extension("was")).expect("renamed");
    let record = layout::PartialRecord {
        total_bytes: Some(body.len() as u64),
        boot_id: layout::boot_id(),
        validator: layout::Validator::default(),
    };
    layout::write_json(&key.with_extension("partial.json"), &record).expect("written");
    assert_eq!(fixture.ensure(&source).await.expect("there"), stored);
    assert_eq!(origin.seen().len(), 1, "nothing is downloaded again");
}

#[tokio::test]
async fn a_wrong_digest_is_told_and_not_downloaded_again_until_the_file_changes() {
    let (body, sha256) = model();
    let mut wrong = body.clone();
    *wrong.last_mut().expect("not empty") ^= 1;
    let origin = Origin::serving(wrong.clone()).await;
    let fixture = Fixture::new().await;
    let source = Source { sha256: Some(sha256.clone()), ..source(&origin.url()) };
    for _ in 0..2 {
        let error = fixture.ensure(&source).await.expect_err("another file");
        assert_eq!(error.reason(), "ChecksumMismatch");
        let message = format!("sha256 of the file is {}, expected {sha256}", super::sha256(&wrong));
        assert_eq!(error.detail(), message);
        assert_eq!(origin.gets(), 1, "the second time only asks whether it has changed");
        assert_eq!(fixture.files(), ["refused.json"]);
    }
    origin.replace(body, Some("\"two\""));
    fixture.ensure(&source).await.expect("the right file now");
    assert_eq!(fixture.files(), ["gguf", "json"]);
}

#[tokio::test]
async fn statuses_are_told_and_only_passing_ones_are_tried_again() {
    let (body, _) = model();
    let origin = Origin::serving(body).await;
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    for (status, reason, requests) in [
        (404, "FileNotFound", 1),
        (410, "FileNotFound", 1),
        (403, "HttpStatus", 1),
        (503, "HttpStatus", 3),
        (429, "HttpStatus", 3),
    ] {
        let before = origin.gets();
        origin.fail((0..requests).map(|_| Fault::Status(status)));
        let error = fixture.ensure(&source).await.expect_err("refused");
        assert_eq!(error.reason(), reason, "{status}: {error}");
        assert_eq!(origin.gets() - before, requests, "{status}");
    }
    origin.fail([Fault::Status(500), Fault::Status(502)]);
    fixture.ensure(&source).await.expect("the third attempt");
}

#[tokio::test]
async fn an_answer_for_other_bytes_is_refused() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.fail([Fault::CutAfter(50_000), Fault::WrongRange]);
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    let error = fixture.ensure(&source).await.expect_err("wrong bytes");
    assert_eq!(error.reason(), "DownloadFailed");
    assert!(error.detail().contains("asked for the bytes from 50000"), "{}", error.detail());
    let stored = fixture.ensure(&source).await.expect("anew");
    assert_eq!(std::fs::read(stored.path).expect("read"), body);
}

#[tokio::test]
async fn addresses_are_checked_as_literals_as_names_and_after_redirects() {
    let (body, _) = model();
    let origin = Origin::serving(body).await;
    let closed = Fixture::with(|config| config.allowed_networks.clear()).await;
    for uri in [origin.url(), format!("http://localhost:{}/m.gguf", origin.port)] {
        let error = closed.ensure(&source(&uri)).await.expect_err("loopback");
        assert_eq!(error.reason(), "AddressNotAllowed", "{uri}: {}", error.detail());
    }
    assert_eq!(origin.seen().len(), 0, "not one request arrived");

    // This store may reach 127.0.0.1 and nothing else that is private.
    let fixture = Fixture::new().await;
    for target in ["http://127.0.0.2/m.gguf", "http://169.254.169.254/latest/meta-data/", "http://[::1]/m.gguf"] {
        origin.fail([Fault::RedirectTo(target.to_owned())]);
        let error = fixture.ensure(&source(&origin.url())).await.expect_err("refused");
        assert_eq!(error.reason(), "AddressNotAllowed", "{target}: {}", error.detail());
    }
    assert_eq!(origin.seen().len(), 3, "and no second attempt");
}

#[tokio::test]
async fn certificates_are_checked_and_encryption_is_not_given_up() {
    let (body, sha256) = model();
    let (origin, authority) = Origin::serving_tls(body).await;
    let source = source(&origin.url());

    let strict = Fixture::with(|config| config.allow_http = false).await;
    let error = strict.ensure(&source).await.expect_err("nobody vouches for the server");
    assert_eq!(error.reason(), "DownloadFailed");
    assert!(error.detail().contains("certificate"), "{}", error.detail());
    assert_eq!(origin.seen().len(), 0);

    let pem = strict.root.path().join("ca.pem");
    std::fs::write(&pem, authority).expect("written");
    let trusting = Fixture::with(|config| {
        config.allow_http = false;
        config.ca_file = Some(pem);
    })
    .await;
    origin.fail([Fault::RedirectTo("http://127.0.0.1:9/m.gguf".to_owned())]);
    let error = trusting.ensure(&source).await.expect_err("redirected to plain HTTP");
    assert!(error.detail().contains("redirected to http://"), "{}", error.detail());

    origin.fail([Fault::CutAfter(100_000)]);
    let stored = trusting.ensure(&source).await.expect("fetched and resumed");
    assert_eq!(stored.sha256.as_ref(), Some(&sha256));
    assert_eq!(origin.seen().last(), Some(&get(Some("bytes=100000-"), Some("\"one\""))));
}

#[tokio::test]
async fn redirects_are_followed_five_times() {
    let (body, _) = model();
    let origin = Origin::serving(body).await;
    let fixture = Fixture::new().await;
    let hop = || Fault::RedirectTo("/elsewhere".to_owned());
    origin.fail((0..6).map(|_| hop()));
    let error = fixture.ensure(&source(&origin.url())).await.expect_err("six hops");
    assert_eq!(error.reason(), "DownloadFailed");
    assert!(error.detail().contains("more than 5 redirects"), "{}", error.detail());
    assert_eq!(origin.seen().len(), 6);
    origin.fail((0..5).map(|_| hop()));
    fixture.ensure(&source(&origin.url())).await.expect("five hops");
}

#[tokio::test]
async fn schemes_are_limited() {
    let fixture = Fixture::with(|config| config.allow_http = false).await;
    for (uri, reason, word) in [
        ("http://example.com/m.gguf", "UnsupportedScheme", "not encrypted"),
        ("s3://bucket/m.gguf", "UnsupportedScheme", "s3://"),
        ("hf://owner/name/m.gguf", "UnsupportedScheme", "hf://"),
        ("no uri", "InvalidSource", "no uri"),
    ] {
        let error = fixture.ensure(&source(uri)).await.expect_err("refused");
        assert_eq!(error.reason(), reason, "{uri}");
        assert!(error.detail().contains(word), "{uri}: {}", error.detail());
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_without_secrets() {
    // A port that was free a moment ago.
    let port = Origin::serving(Vec::new()).await.port;
    let fixture = Fixture::new().await;
    let uri = format!("http://user:secret@127.0.0.1:{port}/m.gguf?token=secret");
    let error = fixture.ensure(&source(&uri)).await.expect_err("nobody there");
    assert_eq!(error.reason(), "DownloadFailed");
    let detail = error.detail();
    assert!(detail.starts_with(&format!("cannot download http://127.0.0.1:{port}/m.gguf: ")), "{detail}");
    assert!(!detail.contains("secret"), "{detail}");
}

#[tokio::test]
async fn a_file_that_does_not_fit_is_refused_before_and_while_it_comes() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    let fixture = Fixture::with(|config| config.capacity_bytes = Some(100_000)).await;
    let source = source(&origin.url());
    let error = fixture.ensure(&source).await.expect_err("too big");
    assert_eq!(error.reason(), "InsufficientStorage");
    let expected = format!("{} bytes are needed and 100000 are free (the store's capacity)", body.len());
    assert_eq!(error.detail(), expected);
    assert!(!fixture.files().contains(&"partial".to_owned()));

    origin.leave_length_out();
    let error = fixture.ensure(&source).await.expect_err("too big");
    assert_eq!(error.reason(), "InsufficientStorage", "{}", error.detail());
    assert!(fixture.files().is_empty(), "{:?}", fixture.files());
}

#[tokio::test]
async fn a_file_of_unknown_length_is_fetched_too() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.leave_length_out();
    let fixture = Fixture::new().await;
    let stored = fixture.ensure(&source(&origin.url())).await.expect("fetched");
    assert_eq!(std::fs::read(stored.path).expect("read"), body);
}

#[tokio::test]
async fn what_is_no_model_is_found_out_at_its_beginning() {
    let size = 64 << 20;
    let page = b"<!doctype html>".iter().copied().cycle().take(size).collect();
    let origin = Origin::serving(page).await;
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    let error = fixture.ensure(&source).await.expect_err("no model");
    assert_eq!(error.reason(), "NotGGUF");
    assert!(fixture.files().iter().all(|name| name != "partial" && name != "gguf"), "{:?}", fixture.files());
    assert!(origin.bytes_sent() < size / 2, "{} bytes were sent for nothing", origin.bytes_sent());

    // A file that was cut before it was put on the server: the header knows.
    let (whole, _) = model();
    let half = &whole[..whole.len() / 2];
    origin.replace(half.to_vec(), Some("\"half\""));
    let error = fixture.ensure(&source).await.expect_err("half a model");
    assert_eq!(error.reason(), "FileTruncated");
    assert!(error.detail().contains(&half.len().to_string()), "{}", error.detail());

    origin.replace(whole, Some("\"whole\""));
    fixture.ensure(&source).await.expect("recovered");
}

#[tokio::test]
async fn requests_for_the_same_file_share_one_download() {
    let (body, _) = model();
    let length = body.len() as u64;
    let origin = Origin::serving(body).await;
    origin.pace(Duration::from_millis(5));
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    let ensure = async || {
        let progress = watch::Sender::new(Progress::default());
        let stored = fixture.store.ensure(&source, &progress, &CancellationToken::new()).await;
        let seen = *progress.borrow();
        (stored.expect("fetched"), seen)
    };
    let (first, second, third) = tokio::join!(ensure(), ensure(), ensure());
    assert_eq!(first, second);
    assert_eq!(second, third);
    assert_eq!(third.1, Progress { bytes_done: length, bytes_total: Some(length) });
    assert_eq!(origin.gets(), 1);
}

#[tokio::test]
async fn whoever_waits_sees_the_progress_of_the_one_who_fetches() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    origin.fail([Fault::StallAfter(128 << 10)]);
    // It is the one who fetches that goes, not the connection.
    let fixture = Fixture::with(|config| config.stall_timeout = Duration::from_mins(10)).await;
    let source = source(&origin.url());
    let (cancel, never) = (CancellationToken::new(), CancellationToken::new());
    let (leader, follower) = (watch::Sender::new(Progress::default()), watch::Sender::new(Progress::default()));
    let mut seen = follower.subscribe();
    let work = async {
        tokio::join!(fixture.store.ensure(&source, &leader, &cancel), fixture.store.ensure(&source, &follower, &never),)
    };
    let watch = async {
        let arrived = seen.wait_for(|p| p.bytes_done == 128 << 10);
        let arrived = tokio::time::timeout(PATIENCE, arrived).await;
        let total = arrived.expect("progress in time").expect("a sender").bytes_total;
        // The leader goes away; the follower takes over and resumes.
        cancel.cancel();
        total
    };
    let ((first, second), total) = tokio::join!(work, watch);
    assert_eq!(total, Some(body.len() as u64));
    assert_eq!(first.expect_err("cancelled").reason(), "Cancelled");
    assert_eq!(std::fs::read(second.expect("fetched").path).expect("read"), body);
    assert_eq!(origin.seen().last(), Some(&get(Some("bytes=131072-"), Some("\"one\""))));
}

#[tokio::test]
async fn a_stored_file_that_was_changed_is_fetched_again() {
    let (body, _) = model();
    let origin = Origin::serving(body.clone()).await;
    let fixture = Fixture::new().await;
    let source = source(&origin.url());
    let stored = fixture.ensure(&source).await.expect("fetched");
    std::fs::write(&stored.path, &body[..1000]).expect("written");
    let again = fixture.ensure(&source).await.expect("fetched");
    assert_eq!(std::fs::read(again.path).expect("read"), body);
    assert_eq!(origin.gets(), 2);
}
