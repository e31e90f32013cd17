//! What a change of size costs, beside the bare calls: for `cargo xtask bench context`.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::engine::error::EngineError;
use crate::engine::ffi::{Batch, Context, ContextParams};
use crate::engine::load;
use crate::engine::prefix::Reuse;
use crate::engine::request::Token;
use crate::engine::step::{Executor, Resized};
use crate::runner::protocol::{ResizeReport, RunnerConfig};

/// Times that each is done; the first does not count, as buffers are not there yet.
const ROUNDS: usize = 6;

/// Cells that stay free in the small context.
const FREE: u32 = 64;

/// Fills the context that `config` begins with and changes it to the largest that it allows, again and again: as the engine
/// does, and by the bare calls.
pub(in crate::engine) fn resizes(config: &RunnerConfig) -> Result<ResizeReport, EngineError> {
    let (model, gpu) = load::open(config, &|_| {})?;
    let load::Loaded { model, context: mut bare, params, plan, .. } = load::load(config, model, gpu)?;
    let (from, to) = (plan.limits.initial, plan.limits.cap);
    if to <= from || from <= FREE {
        return Err(EngineError::InvalidConfig(format!("{from} cells cannot grow to {to}")));
    }
    let tokens: Vec<Token> = (0..from - FREE).map(|number| 300 + Token::try_from(number % 200).unwrap_or(0)).collect();
    let lost = |what: &str| EngineError::Internal(format!("{what} failed"));
    let sized = |cells| ContextParams { cells, ..params.clone() };
    let create = |cells| Context::new(&model, &sized(cells)).map_err(load::context_failed);

    let mut executor = Executor::new(model.clone(), create(from)?, params.clone(), None, Vec::new(), &plan);
    let (id, _) = executor.begin(Reuse::Nothing, &tokens).ok_or_else(|| lost("beginning"))?;
    let mut batch = Batch::new(params.batch);
    for (number, chunk) in tokens.chunks(params.batch as usize).enumerate() {
        let start = number * params.batch as usize;
        let mut rows = Vec::new();
        executor
            .decode(std::iter::once((id, chunk, start, true, &[][..])), &mut rows)
            .map_err(|_| lost("computing"))?;
        batch.clear();
        for (at, &token) in (start..).zip(chunk) {
            batch.add(token, i32::try_from(at).unwrap_or(i32::MAX), 0, at + 1 == start + chunk.len());
        }
        bare.decode(&mut batch).map_err(|_| lost("computing"))?;
    }

    let mut report = ResizeReport { tokens: from - FREE, from, to, ..ResizeReport::default() };
    let mut buffer = Vec::new();
    for round in 0..ROUNDS {
        // Instead of the old one.
        let started = Instant::now();
        let state = bare.state(&mut buffer).ok_or_else(|| lost("taking the state out"))?;
        drop(bare);
        bare = create(to)?;
        let moved = bare.set_state(state);
        let replaced = started.elapsed();
        // Back; and beside the old one, where the streams stand still for the moving alone.
        let mut small = create(from)?;
        let back = bare.state(&mut buffer).is_some_and(|state| small.set_state(state));
        let mut large = create(to)?;
        let started = Instant::now();
        let state = small.state(&mut buffer).ok_or_else(|| lost("taking the state out"))?;
        let beside = large.set_state(state);
        let moving = started.elapsed();
        drop(large);
        bare = small;
        if !(moved && back && beside) {
            return Err(lost("putting the state in"));
        }

        let expect = |resized, what| if resized == Resized::Moved { Ok(()) } else { Err(lost(what)) };
        let started = Instant::now();
        expect(executor.resize(to), "growing")?;
        let ours = started.elapsed();
        expect(executor.resize(from), "shrinking")?;
        let (done, ready) = mpsc::sync_channel(1);
        let begun = executor.prepare(to, move || {
            let _ = done.send(());
        });
        if !begun || ready.recv_timeout(Duration::from_mins(1)).is_err() {
            return Err(lost("making a context beside the other"));
        }
        let started = Instant::now();
        let swapped = executor.prepared(true).ok_or_else(|| lost("taking it into use"))?;
        let standstill = started.elapsed();
        expect(swapped, "swapping")?;
        expect(executor.resize(from), "shrinking")?;
        if round > 0 {
            let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
            report.bare_micros.push(micros(replaced));
            report.resize_micros.push(micros(ours));
            report.moving_micros.push(micros(moving));
            report.stall_micros.push(micros(standstill));
        }
    }
    Ok(report)
}
