//! Tokens a second, for one client and for many.

use std::time::Instant;

use altiplano_tests::report::Row;
use anyhow::{Context as _, Result};

use super::client::{Question, ask, ask_all, count, questions, random_tokens};
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
    Ok(vec![
        beside_bench,
        pace.row("generation, 1 client", "tok/s", Better::More).ratio_at_least(1.0),
        deep.row(format!("generation, 1 client, after {LONG_PROMPT} tokens"), "tok/s", Better::More)
            .ratio_at_least(1.0),
    ])
}

/// Tokens that each of many clients gets.
pub(crate) const GENERATE: u32 = 64;

/// Tokens of the longest prompt of many clients.
const LONGEST: usize = 512;

/// The lengths of short prompts.
pub(crate) fn short_prompts(clients: usize) -> Vec<usize> {
    vec![64; clients]
}

/// Those of long ones: from half the longest on.
pub(crate) fn long_prompts(clients: usize) -> Vec<usize> {
    (0..clients).map(|n| LONGEST / 2 + n * LONGEST / 2 / clients).collect()
}

/// Cells that a client has at most, and the server of so many of them.
pub(crate) const CELLS: usize = LONGEST + GENERATE as usize + 192;

/// Four, eight and sixteen at once: short prompts of one length, and long ones that differ.
pub(super) async fn many_clients(model: &Model) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for clients in [4, 8, 16] {
        let mut servers = vec![ours(model, &dynamic(clients)).await?];
        let fixed = ours(model, &fixed(clients)).await?;
        let fixed_name = fixed.name.clone();
        servers.push(fixed);
        servers.extend(peers(model, clients, CELLS * clients).await?);

        let short = |seed: u64| questions(model, seed, &short_prompts(clients), GENERATE);
        let long = |seed: u64| questions(model, seed, &long_prompts(clients), GENERATE);
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
        let metric = format!("total, {clients} clients, prompts of {} to {LONGEST} tokens, Dynamic", LONGEST / 2);
        rows.push(apart.row(metric, "tok/s", Better::More).ratio_at_least(0.9));
    }
    Ok(rows)
}

/// The context of so many clients, of one pool.
pub(crate) fn dynamic(clients: usize) -> String {
    format!("{{minTokens: {CELLS}, maxTokens: {CELLS}, parallel: {clients}}}")
}

/// And one with a part for each.
pub(crate) fn fixed(clients: usize) -> String {
    format!("{{sizing: Fixed, maxTokens: {CELLS}, parallel: {clients}}}")
}

/// Tokens generated a second by all together, from the first request sent to the last answer's end.
pub(crate) async fn total(server: &Server, questions: &[Question]) -> Result<f64> {
    let started = Instant::now();
    let answers = ask_all(server, questions).await?;
    Ok(count(answers.iter().map(|answer| answer.tokens.len()).sum()) / started.elapsed().as_secs_f64())
}
