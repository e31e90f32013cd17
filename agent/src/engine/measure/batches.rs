//! How soon llama.cpp's bare calls have read prompts that begin alike, and then made a token of each in every step. No queue,
//! no sampling, nobody to tell: no server on the same library is faster on the same CPUs.

use std::time::Instant;

use crate::engine::error::EngineError;
use crate::engine::ffi::{Batch, Context, ContextParams};
use crate::engine::load;
use crate::engine::sizing::pad;
use crate::runner::protocol::{BatchLoad, BatchReport};

/// Times that it is done; the first does not count, as buffers are not there yet.
const ROUNDS: u32 = 2;

/// A token at a position of one sequence, and whether its logits are wanted.
type Entry = (u32, u32, bool);

pub(in crate::engine) fn batches(asked: &BatchLoad) -> Result<BatchReport, EngineError> {
    let BatchLoad { runner, shared, own, generate } = asked;
    let (model, gpu) = load::open(runner, &|_| {})?;
    let load::Loaded { model, context, params, .. } = load::load(runner, model, gpu)?;
    drop(context);
    let streams = u32::try_from(own.len()).unwrap_or(u32::MAX);
    let longest = own.iter().max().map_or(0, |own| shared + own + generate);
    let cells = if params.unified {
        pad(shared + own.iter().map(|own| own + generate).sum::<u32>())
    } else {
        pad(longest).saturating_mul(streams)
    };
    let params = ContextParams { cells, sequences: streams, outputs: streams, ..params };
    let mut context = Context::new(&model, &params).map_err(load::context_failed)?;
    let mut batch = Batch::new(params.batch);
    let mut report = BatchReport::default();
    for round in 0..ROUNDS {
        context.clear();
        let started = Instant::now();
        let reading: Vec<Entry> = (0..*shared).map(|at| (0, at, false)).collect();
        run(&mut context, &mut batch, &reading, round)?;
        for stream in 1..streams {
            let id = i32::try_from(stream).unwrap_or(i32::MAX);
            if *shared > 0 && !context.share(0, id, *shared) {
                return Err(EngineError::Internal("sharing cells failed".to_owned()));
            }
        }
        let begun = started.elapsed();

        let started = Instant::now();
        let ends = |stream: u32, own: u32| (0..own).map(move |at| (stream, shared + at, at + 1 == own));
        let reading: Vec<Entry> = (0..streams).zip(own).flat_map(|(stream, &own)| ends(stream, own)).collect();
        run(&mut context, &mut batch, &reading, round)?;
        let read = started.elapsed();

        let started = Instant::now();
        // The prompts' last step has given each its first token.
        for step in 0..generate.saturating_sub(1) {
            let next: Vec<Entry> =
                (0..streams).zip(own).map(|(stream, own)| (stream, shared + own + step, true)).collect();
            run(&mut context, &mut batch, &next, round)?;
        }
        let generated = started.elapsed();
        if round > 0 {
            let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
            report.shared_micros.push(micros(begun));
            report.own_micros.push(micros(read));
            report.generate_micros.push(micros(generated));
        }
    }
    Ok(report)
}

/// Computes these in as few calls as they fit into.
fn run(context: &mut Context, batch: &mut Batch, entries: &[Entry], round: u32) -> Result<(), EngineError> {
    for chunk in entries.chunks(context.batch() as usize) {
        batch.clear();
        for &(stream, at, output) in chunk {
            let number = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
            let token = 300 + (at * 7919 + stream * 6029 + round * 31) % 20_000;
            batch.add(number(token), number(at), number(stream), output);
        }
        context.decode(batch).map_err(|_| EngineError::Internal("computing failed".to_owned()))?;
    }
    Ok(())
}
