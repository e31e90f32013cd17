//! An embedder's context grows by the ledger's leave, and who cannot have that waits.

use std::path::Path;
use std::sync::Mutex;

use altiplano_test_models::{Pooling, Spec};

use super::*;
use crate::runner::grants::{Grants, Refusal};
use crate::runner::protocol::MemoryUse;

/// Answers what it is told to, and remembers what it was asked for.
#[derive(Default)]
struct Ledger {
    refusal: Mutex<Option<Refusal>>,
    asked: Mutex<Vec<Vec<MemoryUse>>>,
    given_back: Mutex<u32>,
}

impl Ledger {
    fn refuses(&self, refusal: Option<Refusal>) {
        *self.refusal.lock().expect("a lock") = refusal;
    }

    fn asked(&self) -> Vec<Vec<MemoryUse>> {
        self.asked.lock().expect("a lock").clone()
    }
}

impl Grants for Ledger {
    fn ask(&self, more: &[MemoryUse]) -> Result<(), Refusal> {
        self.asked.lock().expect("a lock").push(more.to_vec());
        self.refusal.lock().expect("a lock").clone().map_or(Ok(()), Err)
    }

    fn give_back(&self) {
        *self.given_back.lock().expect("a lock") += 1;
    }
}

fn start(model: &Path, change: impl FnOnce(&mut RunnerConfig)) -> (Engine, Arc<Ledger>) {
    let mut config = config(model.to_owned());
    change(&mut config);
    let ledger = Arc::new(Ledger::default());
    let grants = Some(Arc::clone(&ledger) as Arc<dyn Grants>);
    (Engine::start_with(&config, grants, &|_| {}).expect("the engine starts"), ledger)
}

fn text(tokens: usize) -> Vec<Token> {
    (0..tokens).map(|at| 200 + i32::try_from(at * 7 % 300).expect("a token")).collect()
}

async fn embed(engine: &Engine, tokens: usize, wait: Duration) -> Result<usize, EngineError> {
    let deadline = Some(Instant::now() + wait);
    let request = EmbedRequest { texts: vec![text(tokens)], deadline, ..EmbedRequest::default() };
    let embedding = engine.embed(request).expect("taken");
    let embedded = tokio::time::timeout(Duration::from_mins(3), embedding).await.expect("an end in time")?;
    Ok(embedded.vectors.len())
}

fn bytes(memory: &[MemoryUse]) -> Vec<(String, u64)> {
    memory.iter().map(|part| (part.device.clone(), part.total())).collect()
}

/// What a larger context takes has been asked for, on each device: encoders, which compute a text at once, and decoders; with
/// flash attention, and without, where the copy of the scores counts.
#[tokio::test]
async fn all_that_a_growth_takes_is_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let mean = Spec { pooling: Some(Pooling::Mean), ..Spec::causal_embedder() };
    for (number, spec) in [Spec::embedder(), Spec::causal_embedder(), mean].into_iter().enumerate() {
        let model = folder.path().join(format!("{number}.gguf"));
        spec.write(&model).expect("a model file");
        for flash_attention in [FlashAttention::On, FlashAttention::Off] {
            let (engine, ledger) = start(&model, |config| {
                config.engine = EngineSpec { flash_attention, ..EngineSpec::default() };
            });
            let before = bytes(&engine.report().memory);
            embed(&engine, 1500, Duration::from_mins(3)).await.expect("a vector");
            let after = bytes(&engine.report().memory);
            assert_eq!((engine.report().context_tokens, engine.stats().cells_total), (1536, 1536));
            let questions = ledger.asked();
            let [asked] = &questions[..] else { panic!("one question: {questions:?}") };
            for ((device, before), (_, after)) in before.iter().zip(&after) {
                let asked = bytes(asked).iter().find(|(asked, _)| asked == device).map_or(0, |(_, bytes)| *bytes);
                let more = after.saturating_sub(*before);
                println!("{number}, flash attention {flash_attention:?}, {device}: asked for {asked}, took {more}");
                assert!(asked.abs_diff(more) <= 4096, "{device}: {asked} {more}");
            }
            engine.shutdown(Instant::now());
        }
    }
}

/// While others hold the memory a long text waits, without a slot, and short ones go on; it is embedded when it can be, and
/// says why when its time is over. A refusal for good is told at once, and the context is what it was.
#[tokio::test]
async fn who_needs_what_others_hold_waits_and_stops_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model.gguf");
    Spec::embedder().write(&model).expect("a model file");
    let (engine, ledger) = start(&model, |config| {
        config.context.parallel = 1;
        config.engine.batch_tokens = None;
        config.engine.micro_batch_tokens = None;
    });
    let first = engine.report().context_tokens;
    let soon = Duration::from_mins(3);

    ledger.refuses(Some(Refusal::passing("a busy one holds 5 bytes")));
    let long = tokio::spawn({
        let engine = engine.clone();
        async move { embed(&engine, 1500, soon).await }
    });
    let begun = Instant::now();
    while engine.stats().context_waits == 0 {
        assert!(begun.elapsed() < soon, "{:?}", engine.stats());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for _ in 0..3 {
        assert_eq!(embed(&engine, 100, soon).await, Ok(1));
    }
    // A second one does not ask again before its time, and gives up when that is over.
    let refused = embed(&engine, 1600, Duration::from_millis(200)).await;
    assert!(
        matches!(&refused, Err(EngineError::ContextFull(why)) if why.contains("1600 tokens") && why.contains("5 bytes")),
        "{refused:?}"
    );
    assert_eq!((engine.report().context_tokens, engine.stats().failed, long.is_finished()), (first, 1, false));
    // For all that are a little longer, then for this text alone.
    let asked = ledger.asked();
    assert!(asked.len() >= 2 && asked[0][0].total() > asked[1][0].total(), "{asked:?}");

    ledger.refuses(None);
    assert_eq!(long.await.expect("a task"), Ok(1));
    let stats = engine.stats();
    assert_eq!((stats.resizes, stats.context_waits, stats.cells_total), (1, 2, 1536), "{stats:?}");
    assert!(stats.growths_refused >= 1, "{stats:?}");

    ledger.refuses(Some(Refusal { reason: "all of it is too little".to_owned(), passing: false }));
    let refused = embed(&engine, 2000, soon).await;
    assert!(matches!(&refused, Err(EngineError::ContextFull(why)) if why.contains("too little")), "{refused:?}");
    // Both questions that were granted have been used.
    assert_eq!(*ledger.given_back.lock().expect("a lock"), 0);
    assert_eq!(embed(&engine, 1500, soon).await, Ok(1));

    // A busy embedder gives back what its texts do not need.
    engine.shrink(0);
    assert_eq!(embed(&engine, 100, soon).await, Ok(1));
    assert!(engine.report().context_tokens < 1536, "{:?}", engine.report());
    engine.shutdown(Instant::now());
}
