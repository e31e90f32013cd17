//! Tokens a second, for one client and for many.

use std::time::Instant;

use altiplano_tests::report::Row;
use anyhow::{Context as _, Result};

use super::client::{Question, ask, ask_all, count, random_tokens};
use super::limit::{BARE, limit};
use super::servers::{Model, Server, llama_bench, ours, peers};
use super::turns::{Better, in_turn, median};

/// One stream, from its first token to its last, after a short prompt and after a long one.
pub(super) async fn one_client(model: &Model) -> Result<Vec<Row>> {
    const PROMPT: usize = 64;
    const LONG_PROMPT: usize = 1500;
    const GENERATE: u32 = 192;
    const ROUNDS: u64 = 5;
    let of_length =
        |length| move |seed| Question { prompt: random_tokens(seed, length, model.vocabulary), generate: GENERATE };
    let (question, long) = (of_length(PROMPT), of_length(LONG_PROMPT));
    let mut servers = vec![ours(model, "{minTokens: 2048, maxTokens: 2048, parallel: 1}").await?];
    servers.extend(peers(model, 1, 2048).await?);
    for server in &servers {
        ask(server, &question(99)).await?;
    }
    let mut bare = Vec::new();
    let [pace] = in_turn(&servers, ROUNDS, async |server, round| {
        if server.is_ours {
            bare.push(llama_bench(model, PROMPT, GENERATE).await?);
        }
        Ok([ask(server, &question(round)).await?.pace()])
    })
    .await?;
    // The same prompt each time, so that it is read once.
    let [deep] = in_turn(&servers, 2, async |server, _| Ok([ask(server, &long(7)).await?.pace()])).await?;
    let beside_bench = Row::new("generation, 1 client", "tok/s", median(&pace.ours))
        .beside("llama-bench", median(&bare))
        .ratio_at_least(0.98);
    drop(servers);
    let limit = limit(model, &["Dynamic"], 0, &[PROMPT], GENERATE)?;
    Ok(vec![
        beside_bench,
        pace.row("generation, 1 client", "tok/s", Better::More).ratio_at_least(1.0),
        pace.alone("generation, 1 client", "tok/s").beside(BARE, limit.pace),
        deep.row(format!("generation, 1 client, after {LONG_PROMPT} tokens"), "tok/s", Better::More)
            .ratio_at_least(1.0),
    ])
}

/// Four, eight and sixteen at once: short prompts of one length, and long ones that differ.
pub(super) async fn many_clients(model: &Model) -> Result<Vec<Row>> {
    const LONGEST: usize = 512;
    const GENERATE: u32 = 64;
    let mut rows = Vec::new();
    for clients in [4, 8, 16] {
        let tokens = LONGEST + GENERATE as usize + 192;
        let context = |more| format!("{{{more}, maxTokens: {tokens}, parallel: {clients}}}");
        let mut servers = vec![ours(model, &context(format!("minTokens: {tokens}"))).await?];
        let fixed = ours(model, &context("sizing: Fixed".to_owned())).await?;
        let fixed_name = fixed.name.clone();
        servers.push(fixed);
        servers.extend(peers(model, clients, tokens * clients).await?);

        let short = |seed: u64| questions(model, seed, clients, |_| 64, GENERATE);
        let long = |seed: u64| questions(model, seed, clients, |n| LONGEST / 2 + n * LONGEST / 2 / clients, GENERATE);
        // The first prompts of all find a small context, which then grows.
        for server in &servers {
            total(server, &short(1000)).await?;
        }
        total(&servers[0], &long(1001)).await?;

        let [speed] = in_turn(&servers, 3, async |server, round| Ok([total(server, &short(round)).await?])).await?;
        let metric = format!("total, {clients} clients, prompts of 64 tokens");
        let fixed = speed.of(&fixed_name).context("Fixed was not measured")?;
        for (sizing, series) in [("Dynamic", &speed), ("Fixed", &fixed)] {
            let metric = format!("{metric}, {sizing}");
            rows.push(series.row(&metric, "tok/s", Better::More).ratio_at_least(1.0));
            if clients == 16 {
                rows.push(series.row_beside(&metric, "tok/s", "llama-server default").ratio_at_least(1.5));
            }
        }
        servers.retain(|server| server.name != fixed_name);
        let [apart] =
            in_turn(&servers, 1, async |server, round| Ok([total(server, &long(100 + round)).await?])).await?;
        let metric_of_long = format!("total, {clients} clients, prompts of {} to {LONGEST} tokens", LONGEST / 2);
        rows.push(apart.row(format!("{metric_of_long}, Dynamic"), "tok/s", Better::More).ratio_at_least(0.9));
        drop(servers);
        let lengths = |asked: &[Question]| asked.iter().map(|question| question.prompt.len()).collect::<Vec<_>>();
        for (series, metric, sizing, asked) in [
            (&speed, &metric, "Dynamic", short(0)),
            (&fixed, &metric, "Fixed", short(0)),
            (&apart, &metric_of_long, "Dynamic", long(0)),
        ] {
            let bare = limit(model, &[sizing], 0, &lengths(&asked), GENERATE)?;
            rows.push(series.alone(format!("{metric}, {sizing}"), "tok/s").beside(BARE, bare.cold_total));
        }
    }
    Ok(rows)
}

fn questions(
    model: &Model,
    seed: u64,
    clients: usize,
    length: impl Fn(usize) -> usize,
    generate: u32,
) -> Vec<Question> {
    (0..clients)
        .map(|n| Question { prompt: random_tokens(seed << 8 | n as u64, length(n), model.vocabulary), generate })
        .collect()
}

/// Tokens generated a second by all together, from the first request sent to the last answer's end.
async fn total(server: &Server, questions: &[Question]) -> Result<f64> {
    let started = Instant::now();
    let answers = ask_all(server, questions).await?;
    Ok(count(answers.iter().map(|answer| answer.tokens.len()).sum()) / started.elapsed().as_secs_f64())
}
