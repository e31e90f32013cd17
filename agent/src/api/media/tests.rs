//! What clients send, and what is refused.

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use serde_json::json;

use super::*;

fn encoded(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// A grey PNG.
fn png(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let pixels = vec![100; width as usize * height as usize];
    PngEncoder::new(&mut bytes).write_image(&pixels, width, height, ExtendedColorType::L8).unwrap();
    bytes
}

fn taken(urls: &[String]) -> (String, Vec<Attachment>) {
    let mut images = Vec::new();
    let places = urls
        .iter()
        .map(|url| take_image("messages[0].content[1]", &json!({"image_url": {"url": url}}), &mut images).unwrap());
    (places.collect::<Vec<_>>().join(" and "), images)
}

fn found(text: &str, all: &[Attachment]) -> Result<(String, Vec<Medium>), ApiError> {
    find("messages", text, all, "<m>", Some(16_000))
}

fn refusal(url: String) -> String {
    let (text, images) = taken(&[url]);
    let error = found(&text, &images).unwrap_err();
    assert_eq!(
        (error.status, error.param.as_deref()),
        (http::StatusCode::BAD_REQUEST, Some("messages[0].content[1].image_url.url"))
    );
    error.message
}

#[test]
fn images_find_their_places() {
    let (text, images) = taken(&[encoded(&png(3, 2)), encoded(&png(4, 5))]);
    let (first, second) = text.split_once(" and ").unwrap();
    let sizes = |text: &str| {
        let (text, pictures) = found(text, &images).unwrap();
        let size = |medium: &Medium| match medium {
            Medium::Image(picture) => (picture.width(), picture.height()),
            Medium::Audio(_) => (0, 0),
        };
        (text, pictures.iter().map(size).collect::<Vec<_>>())
    };
    assert_eq!(sizes(&format!("a {first} b {second}")), ("a <m> b <m>".to_owned(), vec![(3, 2), (4, 5)]));
    assert_eq!(sizes(&format!("{second}{first}")), ("<m><m>".to_owned(), vec![(4, 5), (3, 2)]));
    assert_eq!(sizes(&format!("only {second}")), ("only <m>".to_owned(), vec![(4, 5)]), "a template left one out");
    assert_eq!(sizes("none"), ("none".to_owned(), vec![]));
    assert!(found(&first.replace("0__>", "7__>"), &images).is_err());
    assert!(found(PLACE.as_str(), &images).is_err());
    assert_eq!(shown(&format!("a {first} b {second}{second}")), format!("a {MARKER} b {MARKER}{MARKER}"));
    assert_eq!(shown("none"), "none");
}

#[test]
fn a_cut_leaves_images_whole_or_out() {
    let (both, _) = taken(&[encoded(&png(3, 2)), encoded(&png(4, 5))]);
    let text = format!("Look at {both} here, and répondez.");
    let (first, second) = both.split_once(" and ").unwrap();
    for from in (0..text.len()).filter(|&from| text.is_char_boundary(from)) {
        for to in (from..text.len()).filter(|&to| text.is_char_boundary(to)) {
            let mended = mend(&text, format!("{} […] {}", &text[..from], &text[to..]));
            let left = mended.replace(first, "").replace(second, "");
            assert!(!left.contains("__") && !left.contains("media_"), "{from}..{to}: {mended}");
            assert!(mended.contains("[…]") || from == to, "{mended}");
        }
    }
    assert_eq!(mend("no image", "no […] ge".to_owned()), "no […] ge");
}

#[test]
fn what_is_no_image_is_refused() {
    let mut images = Vec::new();
    for (part, param) in [
        (json!({}), "c.image_url"),
        (json!({"image_url": 7}), "c.image_url"),
        (json!({"image_url": {}}), "c.image_url.url"),
        (json!({"image_url": {"url": "https://example.com/a.png"}}), "c.image_url.url"),
        (json!({"image_url": "http://169.254.169.254/"}), "c.image_url"),
        (json!({"image_url": "file:///etc/passwd"}), "c.image_url"),
        (json!({"image_url": "data:image/png,abc"}), "c.image_url"),
    ] {
        let error = take_image("c", &part, &mut images).unwrap_err();
        assert_eq!((error.status, error.param.as_deref()), (http::StatusCode::BAD_REQUEST, Some(param)), "{part}");
    }
    for _ in 0..MAX_MEDIA {
        take_image("c", &json!({"image_url": "data:;base64,AAAA"}), &mut images).unwrap();
    }
    assert!(take_image("c", &json!({"image_url": "data:;base64,AAAA"}), &mut images).is_err(), "too many");

    assert!(refusal("data:image/png;base64,?".to_owned()).contains("base64"));
    assert!(refusal(encoded(b"hello")).contains("PNG, JPEG"));
    assert!(refusal(encoded(&png(30, 30)[..60])).contains("cannot be read"), "cut off");
    let mut broken = png(30, 30);
    broken[45] ^= 0xff;
    assert!(refusal(encoded(&broken)).contains("cannot be read"));
    assert!(refusal(encoded(&png(1, 300))).contains("times as long"));
}

/// A header alone: nothing of the size that it says is taken.
#[test]
fn a_bomb_does_not_go_off() {
    let mut bomb = png(1, 1);
    let say = |bomb: &mut Vec<u8>, width: u32, height: u32| {
        bomb[16..20].copy_from_slice(&width.to_be_bytes());
        bomb[20..24].copy_from_slice(&height.to_be_bytes());
        let sum = crc(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&sum.to_be_bytes());
    };
    say(&mut bomb, 100_000, 100_000);
    assert!(refusal(encoded(&bomb)).contains("pixels are allowed"));
    say(&mut bomb, 5_000, 5_000);
    let (text, images) = taken(&vec![encoded(&bomb); 3]);
    let error = found(&text, &images).unwrap_err();
    assert!(error.message.contains("together"), "{}", error.message);
}

/// CRC-32 of a PNG's chunk.
fn crc(bytes: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 })
    };
    !bytes.iter().fold(!0, step)
}

#[test]
fn forms_of_base64_that_clients_send() {
    let bytes = png(2, 2);
    let standard = base64::engine::general_purpose::STANDARD.encode(&bytes);
    let lines: Vec<&str> = standard.as_bytes().chunks(20).map(|line| std::str::from_utf8(line).unwrap()).collect();
    for data in [standard.clone(), standard.trim_end_matches('=').to_owned(), lines.join("\n")] {
        let (text, images) = taken(&[format!("data:image/png;charset=utf-8;base64,{data}")]);
        assert_eq!(found(&text, &images).unwrap().1.len(), 1);
    }
}

#[test]
fn sound_stands_beside_images() {
    let clip = |data: &str| json!({"input_audio": {"data": data, "format": "mp3"}});
    let tone = base64::engine::general_purpose::STANDARD.encode(include_bytes!("../../../tests/media/tone.mp3"));
    let mut all = Vec::new();
    let image = take_image("a", &json!({"image_url": encoded(&png(3, 2))}), &mut all).unwrap();
    let sound = take_audio("b", &clip(&tone), &mut all).unwrap();
    let again = take_audio("c", &clip(&format!("data:audio/mpeg;base64,{tone}")), &mut all).unwrap();
    let (text, media) = found(&format!("{sound} {image} {again}"), &all).unwrap();
    assert_eq!(text, "<m> <m> <m>");
    assert!(matches!(&media[..], [Medium::Audio(_), Medium::Image(_), Medium::Audio(_)]), "{media:?}");
    assert!(find("messages", &sound, &all, "<m>", None).is_err(), "a model that reads none");

    for (part, param) in [
        (json!({}), "d.input_audio"),
        (json!({"input_audio": "x"}), "d.input_audio"),
        (json!({"input_audio": {"format": "wav"}}), "d.input_audio.data"),
        (json!({"input_audio": {"data": 7, "format": "wav"}}), "d.input_audio.data"),
        (json!({"input_audio": {"data": "https://example.com/a.wav", "format": "wav"}}), "d.input_audio.data"),
        (json!({"input_audio": {"data": "AAAA", "format": "ogg"}}), "d.input_audio.format"),
        (json!({"input_audio": {"data": "AAAA", "format": 1}}), "d.input_audio.format"),
    ] {
        let error = take_audio("d", &part, &mut all).unwrap_err();
        assert_eq!((error.status, error.param.as_deref()), (http::StatusCode::BAD_REQUEST, Some(param)), "{part}");
    }
    for _ in all.len()..MAX_MEDIA {
        take_audio("e", &clip("AAAA"), &mut all).unwrap();
    }
    assert!(take_audio("f", &clip("AAAA"), &mut all).unwrap_err().message.contains("at most"));
}

/// A second of silence packs well, ten minutes of it too: the limit counts all sounds of a request.
#[test]
fn seconds_are_counted_together() {
    let mut file = std::io::Cursor::new(Vec::new());
    let spec =
        hound::WavSpec { channels: 1, sample_rate: 8000, bits_per_sample: 8, sample_format: hound::SampleFormat::Int };
    let mut writer = hound::WavWriter::new(&mut file, spec).unwrap();
    (0..8000 * 250).for_each(|_| writer.write_sample(0_i8).unwrap());
    writer.finalize().unwrap();
    let data = base64::engine::general_purpose::STANDARD.encode(file.into_inner());
    let mut all = Vec::new();
    let mut take = || take_audio("a", &json!({"input_audio": {"data": data, "format": "wav"}}), &mut all).unwrap();
    let (two, three) = (format!("{}{}", take(), take()), take());
    assert_eq!(found(&two, &all).unwrap().1.len(), 2);
    let error = found(&format!("{two}{three}"), &all).unwrap_err();
    assert!(error.message.contains("of which 100 are left"), "{}", error.message);
}
