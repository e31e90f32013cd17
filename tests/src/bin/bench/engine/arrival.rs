//! Four streams run, and a long prompt arrives.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use altiplano_tests::report::Row;
use anyhow::{Result, ensure};

use super::client::{Question, ask, ask_telling, count, random_tokens};
use super::servers::{Model, Server, ours, theirs};
use super::turns::{Better, in_turn, median, percentile};

const STREAMS: usize = 4;
const PROMPT: usize = 8192;
/// Tokens of each stream before the prompt arrives.
const BEFORE: usize = 24;
/// Tokens of each stream: more than fit into the time that the prompt takes. It is hung up on when the prompt is read.
const LENGTH: u32 = 1500;

pub(super) async fn long_prompt(model: &Model) -> Result<Vec<Row>> {
    let cells = 16_384;
    let servers = [
        ours(model, "{minTokens: 16384, maxTokens: 16384, parallel: 8}").await?,
        theirs(model, cells, &["-np", "8", "-kvu"]).await?,
    ];
    for server in &servers {
        ask(server, &Question { prompt: random_tokens(1, 64, model.vocabulary), generate: 16 }).await?;
    }
    let mut bare_steps = Vec::new();
    let [p50, p99, first] = in_turn(&servers, 1, async |server, round| {
        let Watched { step, gaps, first_token } = watch(model, server, round).await?;
        if server.is_ours {
            bare_steps.push(step);
        }
        Ok([percentile(&gaps, 50.0), percentile(&gaps, 99.0), first_token])
    })
    .await?;
    let mut speed = first.clone();
    let per_second = |seconds: &mut f64| *seconds = count(PROMPT) / *seconds;
    speed.ours.iter_mut().for_each(per_second);
    speed.peers.iter_mut().flat_map(|(_, figures)| figures).for_each(per_second);
    let what = format!("{STREAMS} streams while {PROMPT} tokens arrive");
    Ok(vec![
        p99.row(format!("{what}: between tokens p99"), "s", Better::Less).ratio_at_most(0.15),
        p50.row(format!("{what}: between tokens p50"), "s", Better::Less).ratio_at_most(0.08),
        Row::new(format!("{what}: between tokens p50"), "s", median(&p50.ours))
            .beside("its own step without the prompt", median(&bare_steps))
            .ratio_at_most(20.0),
        speed.row(format!("{what}: prompt"), "tok/s", Better::More).ratio_at_least(0.9),
        first.row(format!("{what}: the prompt's first token"), "s", Better::Less).ratio_at_most(1.15),
    ])
}

struct Watched {
    /// Median seconds between the streams' tokens before the prompt.
    step: f64,
    /// Seconds between the streams' tokens while the prompt is read; one that is still open at its end counts.
    gaps: Vec<f64>,
    first_token: f64,
}

async fn watch(model: &Model, server: &Server, round: u64) -> Result<Watched> {
    let slowest = AtomicUsize::new(0);
    let said: Vec<AtomicUsize> = (0..STREAMS).map(|_| AtomicUsize::new(0)).collect();
    let is_read = AtomicBool::new(false);
    let stream = async |n: usize| {
        let prompt = random_tokens(50 + 10 * round + n as u64, 64, model.vocabulary);
        ask_telling(server, &Question { prompt, generate: LENGTH }, |count| {
            said[n].store(count, Ordering::Relaxed);
            slowest.store(said.iter().map(|said| said.load(Ordering::Relaxed)).min().unwrap_or(0), Ordering::Relaxed);
            if is_read.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .await
    };
    let arrives = async {
        while slowest.load(Ordering::Relaxed) < BEFORE {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let prompt = random_tokens(5000 + round, PROMPT, model.vocabulary);
        let answer = ask(server, &Question { prompt, generate: 2 }).await;
        is_read.store(true, Ordering::Relaxed);
        answer
    };
    let streams = futures::future::try_join_all((0..STREAMS).map(stream));
    let (streams, long) = futures::future::try_join(streams, arrives).await?;
    let (sent, read) = (long.sent, long.sent + Duration::from_secs_f64(long.first_token()));
    let seconds = |(from, to): (Instant, Instant)| (to - from).as_secs_f64();
    let while_read = |(from, to): &(Instant, Instant)| *to > sent && *from < read;
    let gaps = streams.iter().flat_map(|stream| stream.gaps().filter(while_read)).map(seconds).collect();
    let start = streams.iter().filter_map(|stream| stream.tokens.get(2)).max().copied().unwrap_or(sent);
    let earlier = |(from, to): &(Instant, Instant)| *from > start && *to < sent;
    let before: Vec<f64> = streams.iter().flat_map(|stream| stream.gaps().filter(earlier)).map(seconds).collect();
    ensure!(
        streams.iter().all(|stream| stream.done > read),
        "{}: a stream ended before the prompt was read",
        server.name
    );
    Ok(Watched { step: median(&before), gaps, first_token: long.first_token() })
}
