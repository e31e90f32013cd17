//! Answers on their way through, and what ends them.

use super::*;

#[tokio::test]
async fn tokens_are_passed_on_as_they_come() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let receiver = Arc::new(std::sync::Mutex::new(Some(receiver)));
    let worker =
        chat(move |_| events(tokio_stream::wrappers::ReceiverStream::new(receiver.lock().unwrap().take().unwrap())));
    let _worker = node.worker("toy", worker);
    let mut pieces = node.ask(&url, &json!({"stream": true})).await.bytes_stream();
    for turn in 0..20 {
        let event = format!("data: {turn}\n\n");
        sender.send(Ok(event.clone().into())).await.unwrap();
        assert_eq!(within("the token", pieces.next()).await.unwrap().unwrap(), event);
        assert_eq!(node.activity("toy"), (1, 0));
    }
    drop(sender);
    assert!(within("the end", pieces.next()).await.is_none());
    until("the request has ended", || node.activity("toy"), |seen| *seen == (0, 0)).await;
}

#[tokio::test]
async fn a_client_that_goes_away_is_noticed_by_the_worker() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let (sender, mut dropped) = mpsc::channel(8);
    let (arrived_sender, mut arrived) = mpsc::channel(8);
    let answer = move |request: Request| {
        let guard = Dropped(sender.clone());
        let arrived = arrived_sender.clone();
        async move {
            let body = axum::body::to_bytes(request.into_body(), 1000).await.unwrap();
            let _ = arrived.try_send(());
            if body.starts_with(b"{\"stream\":true") {
                let first = futures::stream::iter([Ok(Bytes::from("data: 1\n\n"))]);
                return events(first.chain(futures::stream::pending()).inspect(move |_| {
                    let _held = &guard;
                }));
            }
            futures::future::pending::<()>().await;
            drop(guard);
            "".into_response()
        }
    };
    let _worker = node.worker("toy", Router::new().route("/v1/chat/completions", post(answer)));
    for stream in [true, false] {
        let body = json!({"stream": stream});
        let ask = node.ask(&url, &body);
        if stream {
            let mut pieces = ask.await.bytes_stream();
            within("the first event", pieces.next()).await.unwrap().unwrap();
            arrived.recv().await.unwrap();
        } else {
            tokio::select! {
                _ = ask => panic!("an answer to a request that is never answered"),
                seen = within("the request's arrival", arrived.recv()) => seen.unwrap(),
            }
        }
        within("the worker notices", dropped.recv()).await.unwrap();
        until("the request has ended", || node.activity("toy"), |seen| *seen == (0, 0)).await;
    }
}

#[tokio::test]
async fn a_worker_that_dies_in_mid_stream_ends_it_with_an_error_event() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let half = || {
        let pieces = [Ok(Bytes::from("data: 1\n\n")), Ok(Bytes::from("data: {\"half"))];
        events(futures::stream::iter(pieces).chain(futures::stream::pending()))
    };
    let mut worker = node.worker("toy", chat(move |_| half()));
    let mut pieces = node.ask(&url, &json!({"stream": true})).await.bytes_stream();
    assert_eq!(within("the first event", pieces.next()).await.unwrap().unwrap(), "data: 1\n\n");
    worker.kill();
    let rest: Vec<Bytes> = within("the end", pieces.map(Result::unwrap).collect()).await;
    let text = String::from_utf8(rest.concat()).unwrap();
    assert!(text.starts_with("event: error\ndata: {\"error\":{"), "no half event before the error: {text}");
    assert!(text.contains("\"code\":\"worker_exited\"") && text.ends_with("}\n\n"), "{text}");
}

#[tokio::test]
async fn a_request_that_no_byte_answered_is_sent_again_once() {
    let node = Node::start(|_| ()).await;
    let url = node.model("toy", |_| ()).await;
    let asked = Arc::new(AtomicU32::new(0));
    let silent = |asked: Arc<AtomicU32>| {
        let answer = move |request: Request| {
            let asked = asked.clone();
            async move {
                axum::body::to_bytes(request.into_body(), 1000).await.unwrap();
                asked.fetch_add(1, Ordering::SeqCst);
                futures::future::pending::<Response>().await
            }
        };
        Router::new().route("/v1/chat/completions", post(answer))
    };
    let body = json!({"n": 1});
    for is_answered in [true, false] {
        asked.store(0, Ordering::SeqCst);
        let mut first = node.worker("toy", silent(asked.clone()));
        let ask = node.ask(&url, &body);
        let restart = async {
            until("the first worker has the request", || asked.load(Ordering::SeqCst), |asked| *asked == 1).await;
            first.kill();
            until("the request waits", || node.activity("toy"), |seen| *seen == (0, 1)).await;
            node.front.route("toy", Route::Loading);
            if is_answered {
                return node.worker("toy", chat(|_| "again".into_response()));
            }
            let mut second = node.worker("toy", silent(asked.clone()));
            until("the second worker has the request", || asked.load(Ordering::SeqCst), |asked| *asked == 2).await;
            second.kill();
            second
        };
        let (response, _second) = within("the answer", futures::future::join(ask, restart)).await;
        if is_answered {
            assert_eq!(response.text().await.unwrap(), "again");
        } else {
            node.front.route("toy", Route::Loading);
            error(response, 502, "worker_exited").await;
        }
    }
}
