//! Images through every API that takes them: the trained toy model with a random projector.

use altiplano_agent::api::{ApiOptions, ApiState, MAX_MEDIA, router};
use altiplano_test_models::toy;
use axum::Router;
use base64::Engine as _;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;

/// A PNG in base64.
fn png(seed: u8, width: u32, height: u32) -> String {
    let pixel = |place: u32| u8::try_from((place * (u32::from(seed) + 3) / 7) % 256).unwrap();
    let pixels: Vec<u8> = (0..width * height * 3).map(pixel).collect();
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes).write_image(&pixels, width, height, ExtendedColorType::Rgb8).unwrap();
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// A large one that takes few bytes.
fn grey(width: u32, height: u32) -> String {
    let mut bytes = Vec::new();
    let pixels = vec![100; width as usize * height as usize];
    PngEncoder::new(&mut bytes).write_image(&pixels, width, height, ExtendedColorType::L8).unwrap();
    format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

pub(crate) fn url(seed: u8) -> String {
    format!("data:image/png;base64,{}", png(seed, 64, 64))
}

/// The toy model, with a projector or without.
pub(crate) fn serve(folder: &Path, kind: Option<ProjectorKind>) -> (Engine, Router) {
    let path = kind.map(|kind| {
        let path = folder.join("mmproj.gguf");
        Projector::of_toy(kind).write(&path).unwrap();
        path
    });
    let config = RunnerConfig {
        served_name: "toy-chat".to_owned(),
        model_path: toy::path(),
        projector: path,
        context: ContextSpec { min_tokens: Some(1024), max_tokens: Some(1024), ..context(4) },
        threads: 2,
        ..RunnerConfig::default()
    };
    let engine = Engine::start(&config, &|_| {}).unwrap();
    let router = router(ApiState::new(engine.clone(), &config, ApiOptions::default()).unwrap());
    (engine, router)
}

pub(crate) async fn post(router: &Router, path: &str, body: &Value) -> (StatusCode, Value) {
    let request = Request::post(path).body(axum::body::Body::from(body.to_string())).unwrap();
    let answer = router.clone().oneshot(request).await.unwrap();
    let status = answer.status();
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into()))
}

pub(crate) async fn get(router: &Router, path: &str) -> Value {
    let request = Request::get(path).body(axum::body::Body::empty()).unwrap();
    let bytes = router.clone().oneshot(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice(&bytes).unwrap()
}

/// A question by path, with the place of its prompt tokens in the answer and of the text.
pub(crate) type Body = (&'static str, Value, &'static str, &'static str);

/// The prompt tokens and the text that all of these say alike.
pub(crate) async fn said_by_all(router: &Router, bodies: impl IntoIterator<Item = Body>) -> (Value, Value) {
    let mut said: Vec<(Value, Value)> = Vec::new();
    for (path, mut body, tokens, text) in bodies {
        body["model"] = "toy-chat".into();
        for (name, value) in [("temperature", json!(0)), ("max_tokens", json!(16)), ("max_output_tokens", json!(16))] {
            body[name] = value;
        }
        body["options"] = json!({"temperature": 0, "num_predict": 16});
        body["cache_salt"] = path.into();
        let (status, answer) = post(router, path, &body).await;
        assert_eq!(status, 200, "{path}: {answer}");
        said.push((answer.pointer(tokens).unwrap().clone(), answer.pointer(text).unwrap().clone()));
    }
    assert!(said.iter().all(|found| *found == said[0]), "the same question has the same answer: {said:?}");
    said.swap_remove(0)
}

const QUESTION: &str = "What is it?";

/// One question about one image.
fn bodies() -> [Body; 5] {
    let image = png(1, 64, 64);
    [
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": [
                {"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url(1)}}]}]}),
            "/usage/prompt_tokens",
            "/choices/0/message/content",
        ),
        (
            "/v1/responses",
            json!({"input": [{"role": "user", "content": [
                {"type": "input_text", "text": QUESTION}, {"type": "input_image", "image_url": url(1)}]}]}),
            "/usage/input_tokens",
            "/output/0/content/0/text",
        ),
        (
            "/v1/messages",
            json!({"max_tokens": 16, "messages": [{"role": "user", "content": [
                {"type": "text", "text": QUESTION},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": image}}]}]}),
            "/usage/input_tokens",
            "/content/0/text",
        ),
        (
            "/api/chat",
            json!({"stream": false, "messages": [{"role": "user", "content": QUESTION, "images": [image]}]}),
            "/prompt_eval_count",
            "/message/content",
        ),
        (
            "/api/generate",
            json!({"stream": false, "prompt": QUESTION, "images": [image]}),
            "/prompt_eval_count",
            "/response",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_api_takes_images() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, router) = serve(folder.path(), Some(ProjectorKind::Gemma3));
    let said = said_by_all(&router, bodies()).await;
    assert_eq!(engine.stats().pictures, 1, "the same image is computed once");
    let plain = json!({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1});
    let (_, plain) = post(&router, "/v1/chat/completions", &plain).await;
    let difference = said.0.as_u64().unwrap() - plain["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(difference >= 16, "an image of 16 tokens counts: {difference}");

    // Streamed, with what was read before told.
    let (path, mut body, ..) = bodies()[0].clone();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let (status, stream) = post(&router, path, &body).await;
    assert!(status == 200 && stream.as_str().unwrap().ends_with("data: [DONE]\n\n"), "{stream}");

    let (path, body) = ("/v1/messages/count_tokens", bodies()[2].1.clone());
    let (status, counted) = post(&router, path, &body).await;
    assert_eq!((status.as_u16(), &counted["input_tokens"]), (200, &said.0), "{counted}");
    // As llama-server writes it, and takes it back in a prompt_string.
    let (_, rendered) = post(&router, "/apply-template", &bodies()[0].1).await;
    let rendered = rendered["prompt"].as_str().unwrap().to_owned();
    assert_eq!(rendered.matches("<__media__>").count(), 1, "{rendered}");
    let data = url(1).split_once(',').unwrap().1.to_owned();
    let marked = json!({"prompt": {"prompt_string": rendered, "multimodal_data": [data]}, "n_predict": 1});
    let (status, answer) = post(&router, "/completion", &marked).await;
    assert_eq!((status.as_u16(), &answer["tokens_evaluated"]), (200, &said.0), "{answer}");
    let props = get(&router, "/props").await;
    assert_eq!(props["modalities"], json!({"vision": true, "audio": false}));
    let models = get(&router, "/v1/models").await;
    assert!(models.to_string().contains("vision"), "{models}");
    engine.shutdown(Instant::now());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_seen_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (blind, router) = serve(folder.path(), None);
    for (path, body, ..) in bodies() {
        let (status, answer) = post(&router, path, &body).await;
        assert_eq!(status, 400, "{path}: {answer}");
        assert!(answer.to_string().contains("reads text only"), "{path}: {answer}");
    }
    assert_eq!(get(&router, "/props").await["modalities"], json!({"vision": false, "audio": false}));
    blind.shutdown(Instant::now());

    let (engine, router) = serve(folder.path(), Some(ProjectorKind::Gemma3));
    let with = |urls: Vec<String>| {
        let images = urls.into_iter().map(|url| json!({"type": "image_url", "image_url": {"url": url}}));
        json!({"messages": [{"role": "user", "content": images.collect::<Vec<_>>()}], "max_tokens": 1})
    };
    let first = "messages[0].content[0].image_url.url";
    let cut = format!("data:image/png;base64,{}", &png(1, 64, 64)[..200]);
    let last = format!("messages[0].content[{MAX_MEDIA}].image_url.url");
    for (urls, param, words) in [
        (vec!["https://example.com/llama.png".to_owned()], first, "fetches nothing"),
        (vec!["data:image/png;base64,aGVsbG8=".to_owned()], first, "no image"),
        (vec![cut], first, "cannot be read"),
        (vec![grey(8192, 4097)], first, "pixels are allowed"),
        (vec![grey(1, 500)], first, "times as long"),
        (vec![url(1); MAX_MEDIA + 1], last.as_str(), "images and sounds at most"),
    ] {
        let (status, answer) = post(&router, "/v1/chat/completions", &with(urls)).await;
        let error = &answer["error"];
        assert_eq!((status.as_u16(), error["param"].as_str()), (400, Some(param)), "{answer}");
        assert!(error["message"].as_str().unwrap().contains(words), "{answer}");
    }
    // So many that they do not fit into the context.
    let (status, answer) = post(&router, "/v1/chat/completions", &with(vec![url(1); MAX_MEDIA])).await;
    assert_eq!((status.as_u16(), &answer["error"]["code"]), (400, &json!("context_length_exceeded")), "{answer}");
    // Words that look like what stands for an image inside.
    let marker = engine.media_marker().unwrap();
    let body = json!({"messages": [{"role": "user", "content": [
        {"type": "text", "text": marker}, {"type": "image_url", "image_url": {"url": url(1)}}]}], "max_tokens": 1});
    let (status, answer) = post(&router, "/v1/chat/completions", &body).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("messages")), "{answer}");
    // It still answers.
    let (status, _) = post(&router, "/v1/chat/completions", &with(vec![url(1), url(2)])).await;
    assert_eq!(status, 200);
    engine.shutdown(Instant::now());
}
