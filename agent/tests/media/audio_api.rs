//! Sound through every API that takes it: the trained toy model with a random projector.

use altiplano_agent::api::MAX_SECONDS;
use base64::Engine as _;
use serde_json::{Value, json};

use super::images_api::{Body, get, post, said_by_all, serve, url};
use super::*;

/// A WAV file of half a second, in base64.
fn wav(seed: u32) -> String {
    let samples: Vec<u8> =
        (0..8000_u32).flat_map(|place| u16::try_from(place * seed * 37 % 20_000).unwrap().to_le_bytes()).collect();
    base64::engine::general_purpose::STANDARD
        .encode([header(16_000, 1, u32::try_from(samples.len()).unwrap()), samples].concat())
}

/// The header of a WAV file of 16-bit samples.
fn header(rate: u32, channels: u16, bytes: u32) -> Vec<u8> {
    let block = channels * 2;
    [
        &b"RIFF"[..],
        &(36_u32.wrapping_add(bytes)).to_le_bytes(),
        b"WAVEfmt ",
        &16_u32.to_le_bytes(),
        &1_u16.to_le_bytes(),
        &channels.to_le_bytes(),
        &rate.to_le_bytes(),
        &(rate * u32::from(block)).to_le_bytes(),
        &block.to_le_bytes(),
        &16_u16.to_le_bytes(),
        b"data",
        &bytes.to_le_bytes(),
    ]
    .concat()
}

fn part(data: &str, format: &str) -> Value {
    json!({"type": "input_audio", "input_audio": {"data": data, "format": format}})
}

const QUESTION: &str = "What is it?";

/// One question about one sound.
fn bodies() -> [Body; 4] {
    let sound = wav(1);
    [
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}, part(&sound, "wav")]}]}),
            "/usage/prompt_tokens",
            "/choices/0/message/content",
        ),
        (
            "/v1/responses",
            json!({"input": [{"role": "user", "content": [
                {"type": "input_text", "text": QUESTION}, part(&sound, "wav")]}]}),
            "/usage/input_tokens",
            "/output/0/content/0/text",
        ),
        (
            "/api/chat",
            json!({"stream": false, "messages": [{"role": "user", "content": QUESTION, "images": [sound]}]}),
            "/prompt_eval_count",
            "/message/content",
        ),
        (
            "/api/generate",
            json!({"stream": false, "prompt": QUESTION, "images": [sound]}),
            "/prompt_eval_count",
            "/response",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_api_takes_sound() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, router) = serve(folder.path(), Some(ProjectorKind::Ultravox));
    let said = said_by_all(&router, bodies()).await;
    assert_eq!(engine.stats().sounds, 1, "the same sound is computed once");
    let plain = json!({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1});
    let (_, plain) = post(&router, "/v1/chat/completions", &plain).await;
    let difference = said.0.as_u64().unwrap() - plain["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(difference >= 187, "a sound of 187 tokens counts: {difference}");

    // What was read is there for the next one; MP3 and FLAC are read too.
    let (status, again) = post(&router, bodies()[0].0, &bodies()[0].1).await;
    assert_eq!(status, 200, "{again}");
    let (_, again) = post(&router, bodies()[0].0, &bodies()[0].1).await;
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 187, "{again}");
    for (format, bytes) in [("mp3", &include_bytes!("tone.mp3")[..]), ("flac", &include_bytes!("tone.flac")[..])] {
        let data = base64::engine::general_purpose::STANDARD.encode(bytes);
        let body = json!({"messages": [{"role": "user", "content": [part(&data, format)]}], "max_tokens": 1});
        let (status, answer) = post(&router, "/v1/chat/completions", &body).await;
        assert_eq!(status, 200, "{format}: {answer}");
    }
    assert_eq!(engine.stats().sounds, 3);
    let props = get(&router, "/props").await;
    assert_eq!(props["modalities"], json!({"vision": false, "audio": true}));
    let models = get(&router, "/v1/models").await;
    assert!(models.to_string().contains("audio") && !models.to_string().contains("vision"), "{models}");
    engine.shutdown(Instant::now());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_heard_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (kind, words) in [(None, "reads text only"), (Some(ProjectorKind::Gemma3), "reads text and images only")] {
        let (deaf, router) = serve(folder.path(), kind);
        for (path, body, ..) in bodies() {
            let (status, answer) = post(&router, path, &body).await;
            assert_eq!(status, 400, "{path}: {answer}");
            assert!(answer.to_string().contains(words), "{path}: {answer}");
        }
        deaf.shutdown(Instant::now());
    }

    let (engine, router) = serve(folder.path(), Some(ProjectorKind::Ultravox));
    let with = |content: Vec<Value>| json!({"messages": [{"role": "user", "content": content}], "max_tokens": 1});
    let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let file = |rate, channels, claimed, samples: usize| {
        encode(&[header(rate, channels, claimed), vec![7; samples * 2]].concat())
    };
    let first = "messages[0].content[0].input_audio.data";
    let minute = file(4000, 1, 4000 * 2 * 61, 4000 * 61);
    let image = json!({"type": "image_url", "image_url": {"url": url(1)}});
    for (content, param, words) in [
        (vec![part("https://example.com/a.wav", "wav")], first, "fetches nothing"),
        (vec![part("aGVsbG8=", "wav")], first, "no audio"),
        (vec![part("?", "wav")], first, "base64"),
        (vec![part(&wav(1)[..400], "wav")], first, "cannot be read"),
        (vec![part(&file(16_000, 1, 0x7000_0000, 100), "wav")], first, "cannot be read"),
        (vec![part(&file(16_000, 1, 0, 0), "wav")], first, "without samples"),
        (vec![part(&file(16_000, 9, 900, 450), "wav")], first, "9 channels"),
        (vec![part(&file(1000, 1, 200, 100), "wav")], first, "1000 samples in a second"),
        (vec![part(&wav(1), "ogg")], "messages[0].content[0].input_audio.format", "'wav', 'mp3' or 'flac'"),
        (vec![part(&minute, "wav"); 10], "messages[0].content[9].input_audio.data", "600 seconds"),
        (vec![image], "messages[0].content[0].image_url.url", "reads text and audio only"),
    ] {
        let (status, answer) = post(&router, "/v1/chat/completions", &with(content)).await;
        let error = &answer["error"];
        assert_eq!((status.as_u16(), error["param"].as_str()), (400, Some(param)), "{answer}");
        assert!(error["message"].as_str().unwrap().contains(words), "{answer}");
    }
    assert_eq!(MAX_SECONDS, 600);
    // Eight channels become one; so much that it does not fit into the context.
    let (status, answer) =
        post(&router, "/v1/chat/completions", &with(vec![part(&file(16_000, 8, 1600, 800), "wav")])).await;
    assert_eq!(status, 200, "{answer}");
    let (status, answer) = post(&router, "/v1/chat/completions", &with(vec![part(&minute, "wav"); 3])).await;
    assert_eq!((status.as_u16(), &answer["error"]["code"]), (400, &json!("context_length_exceeded")), "{answer}");
    engine.shutdown(Instant::now());
}

/// llama-server's form of prompts that are no chat.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_that_are_no_chat_take_sounds() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, router) = serve(folder.path(), Some(ProjectorKind::Ultravox));
    let marker = get(&router, "/props").await["media_marker"].as_str().unwrap().to_owned();
    let object = |text: &str, files: &[String]| json!({"prompt_string": text, "multimodal_data": files});
    let one = object(&format!("Hear {marker}?"), &[wav(1)]);
    let short = json!({"n_predict": 3, "max_tokens": 3, "temperature": 0, "ignore_eos": true});
    let with = |prompt: Value, more: &Value| {
        let mut body = short.clone();
        body["prompt"] = prompt;
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let none = json!({});
    let (status, native) = post(&router, "/completion", &with(one.clone(), &none)).await;
    assert!(status == 200 && native["tokens_evaluated"].as_u64().unwrap() > 187, "{native}");
    let (status, openai) = post(&router, "/v1/completions", &with(one.clone(), &json!({"echo": true}))).await;
    assert_eq!(status, 200, "{openai}");
    let said = format!("Hear {marker}?{}", native["content"].as_str().unwrap());
    assert_eq!(
        (&openai["choices"][0]["text"], &openai["usage"]["prompt_tokens"]),
        (&said.into(), &native["tokens_evaluated"])
    );
    assert_eq!(engine.stats().sounds, 1, "the same sound is computed once");

    // Prompts with and without, several choices of each: every one has its own files.
    let prompts = json!([one, "plain", object(&marker, &[wav(2)])]);
    let (status, many) = post(&router, "/v1/completions", &with(prompts, &json!({"n": 2}))).await;
    assert_eq!((status.as_u16(), many["choices"].as_array().map(Vec::len)), (200, Some(6)), "{many}");
    assert_eq!(engine.stats().sounds, 2);

    for (prompt, more, param, words) in [
        (object("no place", &[wav(1)]), &none, "prompt.multimodal_data", "1 files"),
        (object(&marker, &["aGVsbG8=".to_owned()]), &none, "prompt.multimodal_data[0]", "reads text and audio only"),
        (object(&marker, &[wav(1)[..400].to_owned()]), &none, "prompt.multimodal_data[0]", "cannot be read"),
        // Six sounds do not fit, and what has sounds is not cut.
        (
            object(&marker.repeat(6), &vec![wav(1); 6]),
            &json!({"altiplano": {"overflow": "DropOldest"}}),
            "prompt",
            "context",
        ),
    ] {
        let (status, answer) = post(&router, "/v1/completions", &with(prompt, more)).await;
        let error = &answer["error"];
        assert_eq!(status, 400, "{answer}");
        assert!(param == "prompt" || error["param"] == param, "{answer}");
        assert!(error["message"].as_str().unwrap().contains(words), "{answer}");
    }
    engine.shutdown(Instant::now());

    let (deaf, router) = serve(folder.path(), None);
    let (status, answer) = post(&router, "/completion", &with(one, &none)).await;
    assert!(status == 400 && answer.to_string().contains("reads text only"), "{answer}");
    deaf.shutdown(Instant::now());
}
