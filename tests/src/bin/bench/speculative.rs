//! Tokens that are guessed ahead, beside llama-server with the same settings: one client, the same file. And what it costs
//! when sequences of two LoRA adapters take turns.

use std::time::Instant;

use altiplano_test_models::{Architecture, Lora, MtpHead, Quantization, Spec};
use altiplano_tests::report::{Report, Row};
use altiplano_tests::sandbox;
use anyhow::{Result, bail};

use crate::engine::client::{Question, ask, ask_with, count, random_tokens};
use crate::engine::servers::{self, Model, Server, ours, theirs};
use crate::engine::turns::{Better, Series, in_turn, median};
use crate::engine::{load_average, shape};

/// The scenarios by name, in their order.
const SCENARIOS: [&str; 4] = ["ngram", "draft", "mtp", "lora"];

const CONTEXT: &str = "{minTokens: 2048, maxTokens: 2048, parallel: 1}";
const CELLS: usize = 2048;

/// All scenarios, or those that are named.
pub(crate) async fn run(only: &[String]) -> Result<Report> {
    if let Some(unknown) = only.iter().find(|name| !SCENARIOS.contains(&name.as_str())) {
        bail!("{unknown:?} is no scenario; these are: {}", SCENARIOS.join(", "));
    }
    let started = Instant::now();
    let load = load_average();
    let mut rows: Vec<Row> = Vec::new();
    for scenario in SCENARIOS.iter().filter(|name| only.is_empty() || only.iter().any(|only| only == *name)) {
        let begun = Instant::now();
        rows.extend(match *scenario {
            "ngram" => ngram().await?,
            "draft" => draft().await?,
            "mtp" => mtp().await?,
            _ => adapters().await?,
        });
        eprintln!("{scenario}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    Ok(Report {
        name: "speculative".into(),
        setting: format!(
            "{:.0} s on {} cores, load {load} before it. One client, greedy, the end ignored. Models of random weights: that of \
             `bench engine` (Q4_0); for the head a Qwen 3.5 of half as many layers (Q8_0) whose head is right nearly always. \
             Ours: agent and worker, llama.cpp {}. Peer: llama.cpp {}. Both: CPU, the same files, threads, context and \
             settings. Median of the rounds; spread: from the least to the most of ours.",
            started.elapsed().as_secs_f64(),
            servers::threads(),
            servers::our_version()?,
            servers::version()?,
        ),
        rows,
    })
}

/// Greedy random models say the same again before long, which is as good as guessing from the past can get.
async fn ngram() -> Result<Vec<Row>> {
    let model = Model::write(&sandbox::subdir("models")?, "bench", &shape())?;
    let guessing =
        Model { engine: ", speculative: {type: NGram, matchTokens: 12, maxTokens: 48}".to_owned(), ..model.clone() };
    // Its `ngram-simple` guesses nothing where the same comes again at once.
    let settings: [&[&str]; 2] = [
        &["--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", "12", "--spec-ngram-mod-n-max", "48"],
        &["--spec-type", "ngram-map-k", "--spec-ngram-map-k-size-n", "12", "--spec-ngram-map-k-size-m", "48"],
    ];
    beside("n-grams of 12, 48 at most", &model, &guessing, &settings).await
}

/// Itself: no other of random weights would say the same. Nothing can be won so; what is lost tells what it costs.
async fn draft() -> Result<Vec<Row>> {
    let model = Model::write(&sandbox::subdir("models")?, "bench", &shape())?;
    let path = model.path.display().to_string();
    let guessing = Model {
        files: format!(", draft: {{uri: 'file://{path}'}}"),
        engine: ", speculative: {type: Draft, maxTokens: 3}".to_owned(),
        ..model.clone()
    };
    let settings = ["--spec-type", "draft-simple", "--spec-draft-n-max", "3", "--model-draft", &path];
    beside("itself as draft model, 3 at most", &model, &guessing, &[&settings]).await
}

async fn mtp() -> Result<Vec<Row>> {
    // Coarser weights are not quiet enough for the head to be right.
    let quantization = Quantization::Q8_0;
    let spec =
        Spec { architecture: Architecture::Qwen35, mtp: Some(MtpHead::Good), layers: 6, quantization, ..shape() };
    let model = Model::write(&sandbox::subdir("models")?, "head", &spec)?;
    let guessing = Model { engine: ", speculative: {type: MTP, maxTokens: 3}".to_owned(), ..model.clone() };
    beside("its own head, 3 at most", &model, &guessing, &[&["--spec-type", "draft-mtp", "--spec-draft-n-max", "3"]])
        .await
}

/// Rows of who guesses by these means, ours and theirs, and of the same without.
async fn beside(means: &str, model: &Model, guessing: &Model, settings: &[&[&str]]) -> Result<Vec<Row>> {
    const ROUNDS: u64 = 3;
    const GENERATE: u32 = 192;
    let alone = ["-np", "1"];
    let plain = [ours(model, CONTEXT).await?, theirs(model, CELLS, &alone).await?];
    let mut servers = vec![ours(guessing, CONTEXT).await?];
    for settings in settings {
        let mut peer = theirs(guessing, CELLS, &[&alone, *settings].concat()).await?;
        peer.name = format!("llama-server, {}", settings.get(1).copied().unwrap_or_default());
        servers.push(peer);
    }
    let question = |seed| Question { prompt: random_tokens(seed, 64, model.vocabulary), generate: GENERATE };
    for server in servers.iter().chain(&plain) {
        ask(server, &question(99)).await?;
    }
    let [pace, right, share] = in_turn(&servers, ROUNDS, async |server, round| {
        let first = ask(server, &question(round)).await?.guesses;
        // Once more, because the first time there is nothing that one could have learnt from.
        let again = ask(server, &question(100 + round)).await?;
        let sum = |one: u64, other: u64| f64::from(u32::try_from(one + other).unwrap_or(u32::MAX));
        let (drafted, right) = (sum(first.0, again.guesses.0), sum(first.1, again.guesses.1));
        Ok([again.pace(), right / drafted.max(1.0), right / f64::from(2 * GENERATE)])
    })
    .await?;
    let [bare] =
        in_turn(&plain, ROUNDS, async |server, round| Ok([ask(server, &question(round)).await?.pace()])).await?;
    let times = |series: &Series, of: &Series| {
        let peer = |series: &Series| series.peers.iter().map(|(_, figures)| median(figures)).fold(f64::NAN, f64::max);
        (median(&series.ours) / median(&of.ours), peer(series) / peer(of))
    };
    let (won, theirs_won) = times(&pace, &bare);
    Ok(vec![
        pace.row(format!("generation, guesses by {means}"), "tok/s", Better::More).ratio_at_least(1.0),
        Row::new(format!("the same ÷ without guesses, {means}"), "", won).beside("llama-server ÷ itself", theirs_won),
        right.row(format!("part of the guesses that was right, {means}"), "", Better::More),
        share.row(format!("part of the tokens that was guessed, {means}"), "", Better::More),
    ])
}

/// Two streams, of one adapter and of two: a step holds sequences of one adapter, so with two each step has one stream.
async fn adapters() -> Result<Vec<Row>> {
    const GENERATE: u32 = 256;
    const ROUNDS: u64 = 3;
    let dir = sandbox::subdir("models")?;
    let plain = Model::write(&dir, "bench", &shape())?;
    let mut files = Vec::new();
    for seed in [1, 2] {
        let path = dir.join(format!("adapter{seed}.gguf"));
        Lora { seed, strength: 0.1, rank: 16, ..Lora::of(&shape()) }.write(&path)?;
        files.push(path.display().to_string());
    }
    let list: Vec<String> = files
        .iter()
        .zip(["one", "two"])
        .map(|(path, name)| format!("{{name: {name}, source: {{uri: 'file://{path}'}}}}"))
        .collect();
    let model = Model { files: format!(", adapters: [{}]", list.join(", ")), ..plain };
    let mut servers = [
        ours(&model, "{minTokens: 2048, maxTokens: 2048, parallel: 2}").await?,
        theirs(&model, 2 * CELLS, &["-np", "2", "--lora", &files[0], "--lora", &files[1]]).await?,
    ];
    "llama-server".clone_into(&mut servers[1].name);
    // Milliseconds of a token, of all streams together: llama-server computes those of other adapters one after the other.
    let together = async |server: &Server, round: u64, adapters: &[usize]| -> Result<f64> {
        let asked = adapters.iter().enumerate().map(|(stream, &adapter)| {
            let seed = (round << 8) + stream as u64;
            let question = Question { prompt: random_tokens(seed, 64, model.vocabulary), generate: GENERATE };
            let more = if server.is_ours {
                serde_json::json!({"model": format!("{}:{}", server.model, ["one", "two"][adapter])})
            } else {
                serde_json::json!({"lora": [{"id": adapter, "scale": 1.0}, {"id": 1 - adapter, "scale": 0.0}]})
            };
            async move { ask_with(server, &question, more, |_| std::ops::ControlFlow::Continue(())).await }
        });
        let answers = futures::future::try_join_all(asked).await?;
        let all = || answers.iter().flat_map(|answer| &answer.tokens);
        let (Some(begun), Some(ended)) = (all().min(), all().max()) else { bail!("an answer without tokens") };
        Ok((*ended - *begun).as_secs_f64() * 1e3 / count(all().count() - 1))
    };
    for server in &servers {
        together(server, 99, &[0, 1]).await?;
    }
    let [alone, same, apart] = in_turn(&servers, ROUNDS, async |server, round| {
        let alone = together(server, 4 * round, &[0]).await?;
        let same = together(server, 4 * round + 1, &[0, 0]).await?;
        Ok([alone, same, together(server, 4 * round + 2, &[0, 1]).await?])
    })
    .await?;
    let switch = |figures: (&[f64], &[f64])| median(figures.0) - median(figures.1);
    let peer = |series: &Series| series.peers.first().map(|(_, figures)| figures.clone()).unwrap_or_default();
    Ok(vec![
        alone.row("a token, one stream of one adapter", "ms", Better::Less).ratio_at_most(1.0),
        same.row("a token, two streams of one adapter", "ms", Better::Less).ratio_at_most(1.0),
        apart.row("a token, two streams of two adapters", "ms", Better::Less).ratio_at_most(1.0),
        Row::new("added to a token by turns of two adapters", "ms", switch((&apart.ours, &alone.ours)))
            .beside("llama-server", switch((&peer(&apart), &peer(&alone)))),
    ])
}
