//! What equal beginnings save, and what keeping them costs.

use std::time::Instant;

use altiplano_tests::report::Row;
use anyhow::Result;

use super::client::{Answer, Question, ask, ask_all, count, questions, random_tokens};
use super::servers::{Model, Server, ours, peers};
use super::turns::{Better, in_turn, median, percentile};

pub(crate) const CLIENTS: usize = 8;
pub(crate) const SHARED: usize = 1500;
pub(crate) const OWN: usize = 50;
pub(crate) const GENERATE: u32 = 64;
const TOKENS: usize = 2048;

/// The context of all of them.
pub(crate) fn context() -> String {
    format!("{{minTokens: {TOKENS}, maxTokens: {TOKENS}, parallel: {CLIENTS}}}")
}

/// What eight at once see with a long beginning in common: seconds to the first token (p50) and tokens a second of all, when
/// nobody has seen it, then the same when it was seen. Each round has a beginning of its own.
pub(crate) async fn cold_and_warm(model: &Model, server: &Server, round: u64) -> Result<[f64; 4]> {
    let beginning = random_tokens(7000 + round, SHARED, model.vocabulary);
    let mut figures = [0.0; 4];
    for (turn, own) in figures.chunks_exact_mut(2).zip([2 * round, 2 * round + 1]) {
        let mut asked = questions(model, 8000 + own, &[OWN; CLIENTS], GENERATE);
        for question in &mut asked {
            question.prompt.splice(..0, beginning.iter().copied());
        }
        let started = Instant::now();
        let answers = ask_all(server, &asked).await?;
        let firsts: Vec<f64> = answers.iter().map(Answer::first_token).collect();
        turn[0] = percentile(&firsts, 50.0);
        turn[1] = count(CLIENTS * GENERATE as usize) / started.elapsed().as_secs_f64();
    }
    Ok(figures)
}

/// Eight at once with a long beginning in common, when nobody has seen it and when it was seen.
pub(super) async fn shared_prefix(model: &Model) -> Result<Vec<Row>> {
    let mut servers = vec![ours(model, &context()).await?];
    servers.extend(peers(model, CLIENTS, TOKENS * CLIENTS).await?);
    let [cold_first, cold_total, warm_first, warm_total] =
        in_turn(&servers, 2, async |server, round| cold_and_warm(model, server, round).await).await?;
    let what = format!("{CLIENTS} clients, {SHARED} shared + {OWN} own tokens");
    Ok(vec![
        cold_first.row(format!("{what}, cold: first token p50"), "s", Better::Less).ratio_at_most(0.25),
        warm_first.row(format!("{what}, warm: first token p50"), "s", Better::Less).ratio_at_most(0.3),
        cold_total.row(format!("{what}, cold: total"), "tok/s", Better::More).ratio_at_least(3.0),
        warm_total.row(format!("{what}, warm: total"), "tok/s", Better::More).ratio_at_least(1.5),
    ])
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
