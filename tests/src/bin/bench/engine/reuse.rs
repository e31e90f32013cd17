//! What equal beginnings save, and what keeping them costs.

use std::time::Instant;

use altiplano_tests::report::Row;
use anyhow::Result;

use super::client::{Question, ask, ask_all, count, random_tokens};
use super::limit::{BARE, limit};
use super::servers::{Model, ours, peers};
use super::turns::{Better, Series, in_turn, median, percentile};

/// Eight at once with a long beginning in common, when nobody has seen it and when it was seen.
pub(super) async fn shared_prefix(model: &Model) -> Result<Vec<Row>> {
    const CLIENTS: usize = 8;
    const SHARED: usize = 1500;
    const OWN: usize = 50;
    const GENERATE: u32 = 64;
    const TOKENS: usize = 2048;
    let context = format!("{{minTokens: {TOKENS}, maxTokens: {TOKENS}, parallel: {CLIENTS}}}");
    let mut servers = vec![ours(model, &context).await?];
    servers.extend(peers(model, CLIENTS, TOKENS * CLIENTS).await?);
    let questions = |shared: u64, own: u64| -> Vec<Question> {
        let beginning = random_tokens(shared, SHARED, model.vocabulary);
        let with_end = |n: usize| {
            let end = random_tokens((own << 8) | n as u64, OWN, model.vocabulary);
            Question { prompt: [beginning.clone(), end].concat(), generate: GENERATE }
        };
        (0..CLIENTS).map(with_end).collect()
    };
    let [cold_first, cold_total, warm_first, warm_total] = in_turn(&servers, 2, async |server, round| {
        let (mut first, mut total) = ([0.0; 2], [0.0; 2]);
        for (turn, own) in [2 * round, 2 * round + 1].into_iter().enumerate() {
            let started = Instant::now();
            let answers = ask_all(server, &questions(7000 + round, 8000 + own)).await?;
            let firsts: Vec<f64> = answers.iter().map(super::client::Answer::first_token).collect();
            first[turn] = percentile(&firsts, 50.0);
            total[turn] = count(CLIENTS * GENERATE as usize) / started.elapsed().as_secs_f64();
        }
        Ok([first[0], total[0], first[1], total[1]])
    })
    .await?;
    drop(servers);
    let what = format!("{CLIENTS} clients, {SHARED} shared + {OWN} own tokens");
    let bare = limit(model, &["Dynamic"], SHARED, &[OWN; CLIENTS], GENERATE)?;
    let beside_bare =
        |series: &Series, metric: &str, unit, bare| series.alone(format!("{what}, {metric}"), unit).beside(BARE, bare);
    let limits = [
        beside_bare(&cold_first, "cold: first token p50", "s", bare.cold_first),
        beside_bare(&warm_first, "warm: first token p50", "s", bare.warm_first),
        beside_bare(&cold_total, "cold: total", "tok/s", bare.cold_total),
        beside_bare(&warm_total, "warm: total", "tok/s", bare.warm_total),
    ];
    let targets = [
        cold_first.row(format!("{what}, cold: first token p50"), "s", Better::Less).ratio_at_most(0.25),
        warm_first.row(format!("{what}, warm: first token p50"), "s", Better::Less).ratio_at_most(0.3),
        cold_total.row(format!("{what}, cold: total"), "tok/s", Better::More).ratio_at_least(3.0),
        warm_total.row(format!("{what}, warm: total"), "tok/s", Better::More).ratio_at_least(1.5),
    ];
    Ok(targets.into_iter().chain(limits).collect())
}

/// One stream, alone and after thirty prompts whose cells were kept.
pub(super) async fn beside_cached(model: &Model) -> Result<Vec<Row>> {
    const PREFIXES: u64 = 30;
    const ROUNDS: u64 = 4;
    let server = ours(model, "{minTokens: 16384, maxTokens: 16384, parallel: 2}").await?;
    let stream = |seed| Question { prompt: random_tokens(seed, 64, model.vocabulary), generate: 128 };
    let speeds = async |first: u64| -> Result<Vec<f64>> {
        let mut all = Vec::new();
        for round in 0..ROUNDS {
            all.push(ask(&server, &stream(first + round)).await?.pace());
        }
        Ok(all)
    };
    ask(&server, &stream(1)).await?;
    let alone = speeds(100).await?;
    for prefix in 0..PREFIXES {
        let prompt = random_tokens(9000 + prefix, 384, model.vocabulary);
        ask(&server, &Question { prompt, generate: 1 }).await?;
    }
    let beside = speeds(200).await?;
    let row = Row::new(format!("one stream beside {PREFIXES} cached prefixes of 384 tokens"), "tok/s", median(&beside));
    Ok(vec![row.beside("itself, nothing cached", median(&alone)).ratio_at_least(0.95)])
}
