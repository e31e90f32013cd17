//! Samplers and grammars on real logits.

use altiplano_agent::engine::{DryParams, Grammar, Mirostat, SamplerKind, Triggers};
use serde_json::{Value, json};

use super::*;

type Seeded = fn(u32) -> SamplingParams;

type IsRight<'f> = &'f dyn Fn(&str) -> bool;

/// Every token has a chance.
fn hot(seed: u32) -> SamplingParams {
    SamplingParams { temperature: 3.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(seed), ..SamplingParams::default() }
}

/// A model with random weights and three sequences at once.
fn start_random(vocab: u32) -> (TempDir, Engine) {
    let (folder, path) = generated(&Spec { vocab, ..Spec::default() });
    (folder, start(&config(path, dynamic(256, 1024, 3))))
}

async fn tokens(engine: &Engine, sampling: SamplingParams) -> Vec<Token> {
    let request = GenerateRequest { max_tokens: Some(16), sampling, ..request(engine, "Once upon a time") };
    ask(engine, request).await.tokens
}

/// The two most probable first tokens.
async fn best(engine: &Engine) -> (Token, Token) {
    let request = GenerateRequest { max_tokens: Some(1), logprobs: Some(2), ..request(engine, "Once upon a time") };
    let answer = ask(engine, request).await;
    (answer.logprobs[0].top[0].token, answer.logprobs[0].top[1].token)
}

#[tokio::test]
async fn each_sampler_takes_away_what_it_should() {
    let (_folder, engine) = start_random(512);
    let greedy_tokens = tokens(&engine, greedy()).await;
    assert_ne!(tokens(&engine, hot(1)).await, greedy_tokens, "the model must not be sure of itself");
    // What leaves one token leaves the best one.
    let narrow = [
        ("temperature", SamplingParams { temperature: 1e-6, ..hot(1) }),
        ("top_k", SamplingParams { top_k: 1, ..hot(1) }),
        ("top_p", SamplingParams { top_p: 0.0, ..hot(1) }),
        ("min_p", SamplingParams { min_p: 1.0, ..hot(1) }),
        ("top_n_sigma", SamplingParams { top_n_sigma: 1e-6, ..hot(1) }),
        ("mirostat", SamplingParams { mirostat: Mirostat::V1, mirostat_tau: 0.0, mirostat_eta: 0.0, ..hot(1) }),
        ("mirostat 2", SamplingParams { mirostat: Mirostat::V2, mirostat_tau: 0.0, mirostat_eta: 0.0, ..hot(1) }),
        ("dynatemp", SamplingParams { temperature: 0.5, dynatemp_range: 0.5, dynatemp_exponent: 1000.0, ..hot(1) }),
    ];
    for (name, sampling) in narrow {
        assert_eq!(tokens(&engine, sampling).await, greedy_tokens, "{name}");
    }
    // A sampler that is not in the order is not used.
    let without = SamplingParams { samplers: vec![SamplerKind::Temperature], top_k: 1, ..hot(1) };
    assert_eq!(tokens(&engine, without).await, tokens(&engine, hot(1)).await);

    let (first, second) = best(&engine).await;
    // XTC takes the best of two away, and leaves min_keep.
    let xtc = SamplingParams { top_k: 2, xtc_probability: 1.0, xtc_threshold: 0.0, ..hot(1) };
    assert_eq!(tokens(&engine, xtc.clone()).await[0], second);
    let mut kept = Vec::new();
    for seed in 0..12 {
        let sampling = SamplingParams { min_keep: 2, temperature: 20.0, seed: Some(seed), ..xtc.clone() };
        kept.push(tokens(&engine, sampling).await[0]);
    }
    assert!(kept.contains(&first) && kept.contains(&second), "{kept:?} of {first} and {second}");
    let never = SamplingParams { xtc_threshold: 0.6, ..xtc };
    assert_eq!(tokens(&engine, SamplingParams { top_k: 1, ..never }).await, greedy_tokens, "above 0.5 is off");
    // Of two tokens, one all but certain, the one nearer to the target comes, where the sampler is named.
    let order = vec![SamplerKind::AdaptiveP, SamplerKind::TopK, SamplerKind::Temperature];
    let adaptive =
        |target, samplers| SamplingParams { top_k: 2, temperature: 1e-5, adaptive_target: target, samplers, ..hot(1) };
    assert_eq!(tokens(&engine, adaptive(0.0, order.clone())).await[0], second);
    assert_eq!(tokens(&engine, adaptive(1.0, order)).await[0], first);
    assert_eq!(tokens(&engine, adaptive(0.0, SamplerKind::DEFAULT_ORDER.to_vec())).await[0], first);
    // The most typical token is one, whatever the seed.
    let typical = |seed| SamplingParams { typical_p: 1e-6, ..hot(seed) };
    assert_eq!(tokens(&engine, typical(1)).await, tokens(&engine, typical(2)).await);
    assert_ne!(tokens(&engine, typical(1)).await, tokens(&engine, hot(1)).await);
    stop(&engine);
}

#[tokio::test]
async fn the_same_seed_says_the_same() {
    let (_folder, engine) = start_random(512);
    let kinds: [(&str, Seeded); 5] = [
        ("plain", hot),
        ("xtc", |seed| SamplingParams { xtc_probability: 0.5, xtc_threshold: 0.0, top_k: 9, ..hot(seed) }),
        ("mirostat", |seed| SamplingParams { mirostat: Mirostat::V1, ..hot(seed) }),
        ("mirostat 2", |seed| SamplingParams { mirostat: Mirostat::V2, ..hot(seed) }),
        ("dynatemp", |seed| SamplingParams { dynatemp_range: 1.0, ..hot(seed) }),
    ];
    for (name, sampling) in kinds {
        let said = tokens(&engine, sampling(7)).await;
        assert_eq!(tokens(&engine, sampling(7)).await, said, "{name}");
        assert_ne!(tokens(&engine, sampling(8)).await, said, "{name}");
    }
    stop(&engine);
}

#[tokio::test]
async fn biases_penalties_and_dry_change_what_is_said() {
    let engine = start_toy(dynamic(256, 1024, 2));
    let ask_for =
        |sampling| GenerateRequest { max_tokens: Some(60), sampling, ..request(&engine, &chat(toy::ENDLESS_QUESTION)) };
    let song = ask(&engine, ask_for(greedy())).await.text;
    assert!(song.contains("la la la la"), "{song}");
    let dry = DryParams { multiplier: 50.0, allowed_length: 2, ..DryParams::default() };
    let varied = ask(&engine, ask_for(SamplingParams { dry: dry.clone(), ..greedy() })).await.text;
    assert!(song.starts_with(&varied[..6]) && !varied.contains("la la la la la la la la"), "{varied}");
    let breakers = vec!["la".to_owned()];
    let broken = DryParams { sequence_breakers: breakers, ..dry.clone() };
    assert_eq!(ask(&engine, ask_for(SamplingParams { dry: broken, ..greedy() })).await.text, song);
    let short = DryParams { penalty_last_n: 2, ..dry };
    assert_eq!(
        ask(&engine, ask_for(SamplingParams { dry: short, ..greedy() })).await.text,
        song,
        "looks back too little"
    );

    let penalty = SamplingParams { presence_penalty: 100.0, ..greedy() };
    assert!(!ask(&engine, ask_for(penalty.clone())).await.text.contains("la la la"));
    let forgetful = SamplingParams { repeat_last_n: 0, ..penalty };
    assert_eq!(ask(&engine, ask_for(forgetful)).await.text, song);

    let never = SamplingParams { text_bias: vec![(" la".to_owned(), f32::NEG_INFINITY)], ..greedy() };
    assert!(!ask(&engine, ask_for(never)).await.text.contains(" la"));
    let wanted =
        SamplingParams { text_bias: vec!["b".to_owned()].into_iter().map(|text| (text, 100.0)).collect(), ..greedy() };
    assert_eq!(ask(&engine, ask_for(wanted)).await.text, "b".repeat(60));
    stop(&engine);
}

fn schemas() -> Vec<Value> {
    let address = json!({
        "type": "object",
        "properties": {"street": {"type": "string", "maxLength": 8}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
        "required": ["street", "zip"],
        "additionalProperties": false,
    });
    vec![
        json!({"const": "only this"}),
        json!({"type": "boolean"}),
        json!({"enum": ["red", "green", 3, null]}),
        json!({"type": "integer", "minimum": -5, "maximum": 1234}),
        json!({"type": "string", "minLength": 2, "maxLength": 6}),
        json!({"type": "string", "format": "date"}),
        json!({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}),
        json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"], "additionalProperties": false}),
        address.clone(),
        json!({"anyOf": [{"type": "null"}, address]}),
        json!({"oneOf": [{"type": "boolean"}, {"const": "é☃😀 \"quoted\" \\ \n"}]}),
        json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 5},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
                "left": {"$ref": "#/$defs/leaf"},
                "right": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
            },
            "required": ["name", "tags", "left", "right"],
            "additionalProperties": false,
            "$defs": {"leaf": {
                "type": "object",
                "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["m", "s"]}},
                "required": ["value", "unit"],
                "additionalProperties": false,
            }},
        }),
    ]
}

/// Random weights know no JSON: what is valid is the grammar's work alone.
#[tokio::test]
async fn any_model_says_json_that_its_schema_allows() {
    for tokenizer in [altiplano_test_models::Tokenizer::Bpe, altiplano_test_models::Tokenizer::Spm] {
        let (_folder, path) = generated(&Spec { vocab: 2000, tokenizer, ..Spec::default() });
        let engine = start(&config(path, dynamic(256, 1024, 3)));
        for schema in schemas() {
            let validator = jsonschema::validator_for(&schema).expect("a schema");
            for seed in 0..4 {
                let sampling = if seed == 0 { greedy() } else { hot(seed) };
                let request = GenerateRequest {
                    grammar: Some(Grammar::JsonSchema(schema.clone())),
                    max_tokens: Some(600),
                    sampling,
                    ..request(&engine, "Say something in JSON:")
                };
                let answer = ask(&engine, request).await;
                assert_eq!(answer.reason(), FinishReason::Stop, "{schema} {tokenizer:?} {seed}: {:?}", answer.text);
                let value: Value =
                    serde_json::from_str(&answer.text).unwrap_or_else(|error| panic!("{error}: {:?}", answer.text));
                assert!(validator.is_valid(&value), "{schema} {tokenizer:?} {seed}: {value}");
            }
        }
        stop(&engine);
    }
}

fn gbnf(source: &str) -> Grammar {
    Grammar::Gbnf { source: source.to_owned(), lazy: None, prefix: String::new() }
}

#[tokio::test]
async fn any_model_follows_gbnf() {
    let (_folder, engine) = start_random(2000);
    let word = |text: &str| {
        text.split('-').all(|part| (2..=3).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_lowercase()))
    };
    let cases: [(&str, IsRight<'_>); 4] = [
        ("root ::= \"yes\" | \"no\"", &|text| text == "yes" || text == "no"),
        ("root ::= [a-z]{2,3} (\"-\" [a-z]{2,3}){3}", &word),
        ("root ::= [α-ω☃😀]{5}", &|text| text.chars().count() == 5 && !text.contains('\u{fffd}')),
        ("root ::= a\na ::= \"(\" a \")\" | [0-9]", &|text| text.matches('(').count() == text.matches(')').count()),
    ];
    for (source, is_right) in cases {
        for seed in 0..4 {
            let sampling = if seed == 0 { greedy() } else { hot(seed) };
            let request = GenerateRequest {
                grammar: Some(gbnf(source)),
                max_tokens: Some(if source.contains("(\"") { 40 } else { 400 }),
                sampling,
                ..request(&engine, "Say something:")
            };
            let answer = ask(&engine, request).await;
            // Nested parentheses may never be closed.
            if !source.contains("\"(\"") || answer.reason() == FinishReason::Stop {
                assert_eq!(answer.reason(), FinishReason::Stop, "{source}: {:?}", answer.text);
                assert!(is_right(&answer.text), "{source}: {:?}", answer.text);
            }
        }
    }
    // The prompt has said its beginning already.
    let continued =
        Grammar::Gbnf { source: "root ::= \"<think>\" \"a\"{3}".to_owned(), lazy: None, prefix: "<think>a".to_owned() };
    let request = GenerateRequest { grammar: Some(continued), ..request(&engine, "<think>a") };
    assert_eq!(ask(&engine, request).await.text, "aa");
    stop(&engine);
}

/// The model says what it likes until the trigger comes.
#[tokio::test]
async fn a_lazy_grammar_waits_for_its_trigger() {
    let engine = start_toy(dynamic(256, 1024, 2));
    let sing = |lazy| GenerateRequest {
        grammar: Some(Grammar::Gbnf {
            source: "root ::= \" la la\" \" ha\"{2} \"!\"".to_owned(),
            lazy,
            prefix: String::new(),
        }),
        max_tokens: Some(60),
        ..request(&engine, &chat(toy::ENDLESS_QUESTION))
    };
    let free = ask(&engine, GenerateRequest { grammar: None, ..sing(None) }).await.text;
    let (before, _) = free.split_once(" la").expect("it sings");
    for triggers in [
        Triggers { words: vec![" la".to_owned()], ..Triggers::default() },
        Triggers { patterns: vec!["( la)".to_owned()], ..Triggers::default() },
        Triggers { tokens: engine.tokenize(" la", false, false).expect("tokens")[..1].to_vec(), ..Triggers::default() },
    ] {
        let answer = ask(&engine, sing(Some(triggers.clone()))).await;
        assert_eq!(answer.text, format!("{before} la la ha ha!"), "{triggers:?}");
        assert_eq!(answer.reason(), FinishReason::Stop);
    }
    let never = Triggers { words: vec!["never said".to_owned()], ..Triggers::default() };
    assert_eq!(ask(&engine, sing(Some(never))).await.text, free);
    stop(&engine);
}

/// What cannot be compiled is refused with its reason, what takes too much is refused or ended, and nobody else notices.
#[tokio::test]
async fn hostile_grammars_are_refused_or_end() {
    let engine = start_toy(dynamic(256, 1024, 3));
    let wants =
        |grammar| GenerateRequest { grammar: Some(grammar), max_tokens: Some(50), ..request(&engine, &chat("Hello!")) };
    let deep = (0..80).fold(json!({"type": "string"}), |inner, _| json!({"type": "array", "items": inner}));
    let anything: Vec<Value> =
        (0..10).map(|index| json!({"properties": {format!("p{index}"): {"type": "string"}}})).collect();
    let refused = [
        (Grammar::JsonSchema(json!(17)), "an object or a boolean"),
        (Grammar::JsonSchema(json!({"type": "frob"})), "frob"),
        (Grammar::JsonSchema(json!({"not": {"type": "string"}})), "not"),
        (Grammar::JsonSchema(json!({"$ref": "#/nowhere"})), "nowhere"),
        (Grammar::JsonSchema(json!({"$ref": "http://127.0.0.1:1/schema"})), "not fetch"),
        (Grammar::JsonSchema(json!({"$ref": "#"})), "no JSON"),
        (Grammar::JsonSchema(json!(false)), "false"),
        (Grammar::JsonSchema(json!({"type": "string", "pattern": "(?=a)"})), "look-around"),
        (Grammar::JsonSchema(json!({"multipleOf": 1_000_003})), "multipleOf"),
        (Grammar::JsonSchema(deep), "nested deeper"),
        (Grammar::JsonSchema(json!({"allOf": vec![json!({"anyOf": anything}); 6]})), "too"),
        (gbnf("root = \"a\""), "line 1"),
        (gbnf("root ::= root \"a\""), "left recursion"),
        (gbnf(&format!("root ::= {}", "\"a\"{2000} ".repeat(200))), "larger"),
        (gbnf(&"(".repeat(300_000)), "bytes"),
    ];
    for (grammar, says) in refused {
        let begun = Instant::now();
        let shown: String = format!("{grammar:?}").chars().take(100).collect();
        match engine.submit(wants(grammar)).map(|_| ()) {
            Err(SubmitError::InvalidGrammar { reason, .. }) => {
                assert!(reason.contains(says) && reason.len() < 600, "{shown}: {reason}");
            }
            other => panic!("{shown}: {other:?}"),
        }
        assert!(begun.elapsed() < PATIENCE, "{shown}: {:?}", begun.elapsed());
    }

    // Accepted, and as bad as they can be while they run.
    let doubled = (0..60).map(|rule| format!("r{rule} ::= \"\" | r{0} r{0}\n", rule + 1));
    let doubling = doubled.collect::<Vec<_>>().concat();
    let dear = [
        gbnf(&format!("root ::= \"a\" r0\n{doubling}r60 ::= [a-z]")),
        gbnf("root ::= .{0,2000} .{0,2000} .{0,2000} .{0,2000} \"!\""),
        Grammar::JsonSchema(json!({"type": "string", "pattern": "(.*a.*b){50}"})),
        Grammar::JsonSchema(json!({"type": "string", "pattern": "^(a*)*(a|aa){100}(b|[a-z]{0,500}){100}$"})),
        Grammar::JsonSchema(json!({"type": "array", "minItems": 1_000_000, "items": {"type": "string"}})),
        Grammar::JsonSchema(
            json!({"type": "object", "additionalProperties": {"type": "object", "additionalProperties": true}}),
        ),
    ];
    for grammar in dear {
        let begun = Instant::now();
        let shown: String = format!("{grammar:?}").chars().take(100).collect();
        let question = &questions(1)[0];
        let beside = ask(&engine, request(&engine, &question.0));
        let hostile = async {
            match engine.submit(wants(grammar)) {
                Ok(generation) => match read(generation).await.end {
                    Ok(_) | Err(EngineError::GrammarFailed(_)) => {}
                    Err(error) => panic!("{shown}: {error}"),
                },
                Err(SubmitError::InvalidGrammar { .. }) => {}
                Err(error) => panic!("{shown}: {error}"),
            }
        };
        let (answer, ()) = futures::join!(beside, hostile);
        assert_eq!(answer.text, question.1, "{shown}");
        assert!(begun.elapsed() < PATIENCE, "{shown}: {:?}", begun.elapsed());
    }
    stop(&engine);
}
