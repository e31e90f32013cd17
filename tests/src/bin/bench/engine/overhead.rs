//! What our own code costs: a model so small that computing it is nothing.

use altiplano_tests::report::Row;
use anyhow::Result;

use super::client::{Question, ask, random_tokens};
use super::servers::{Model, Server, llama_bench, ours, peers};
use super::turns::{Better, in_turn};

const REQUESTS: u64 = 60;
const TOKENS: u32 = 1000;

pub(super) async fn added(tiny: &Model) -> Result<Vec<Row>> {
    let mut servers = vec![ours(tiny, "{minTokens: 2048, maxTokens: 2048, parallel: 1}").await?];
    servers.extend(peers(tiny, 1, 2048).await?);
    let question = |seed, generate| Question { prompt: random_tokens(seed, 8, tiny.vocabulary), generate };
    for server in &servers {
        ask(server, &question(1, TOKENS)).await?;
    }
    let step = 1000.0 / llama_bench(tiny, 0, 512).await?;
    let [request, token] = in_turn(&servers, 5, async |server, round| {
        let mut requests = Vec::new();
        for number in 0..REQUESTS {
            let answer = ask(server, &question(1000 * (round + 1) + number, 1)).await?;
            requests.push((answer.done - answer.sent).as_secs_f64() * 1000.0 - step);
        }
        let stream = ask(server, &question(17 + round, TOKENS)).await?;
        Ok([super::turns::median(&requests), 1000.0 / stream.pace() - step])
    })
    .await?;
    let mut rows = vec![
        request.row("added to a request of one token, p50 (0.2 M weights)", "ms", Better::Less).ratio_at_most(1.0),
        token.row("added to a streamed token (0.2 M weights)", "ms", Better::Less).ratio_at_most(1.0),
    ];
    // Of llama-server most is llama.cpp, and both have the same weights and cells.
    let (own, peer) = (resident(&servers[0])?, resident(&servers[2])?);
    let more = "worker's resident memory beyond llama-server's (0.2 M weights)";
    rows.push(Row::new(more, "MiB", own - peer).below(25.0));
    Ok(rows)
}

/// Resident memory of the process that has the model, in MiB.
fn resident(server: &Server) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.worker()?))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    let kibibytes: f64 = line.split_whitespace().nth(1).unwrap_or_default().parse()?;
    Ok(kibibytes / 1024.0)
}
