//! What was predicted, beside what a worker takes: llama.cpp's part to the percent, the whole process to three percent or
//! 64 MiB. What a worker says to take of a GPU, beside the driver's account: to three percent or 16 MiB.

use altiplano_crds::model_deployment::{CacheType, ContextSizing};
use altiplano_test_models::Architecture;
use altiplano_test_vulkan_accounts::Accounts;

use super::*;

#[derive(Clone)]
struct Case {
    name: &'static str,
    spec: Spec,
    context: ContextSpec,
    engine: EngineSpec,
    device: &'static str,
    /// `None`: all.
    gpu_layers: Option<u32>,
    /// Tokens of the request that fills the context, so that compute buffers are touched.
    prompt: usize,
}

fn fixed(max_tokens: i32, parallel: i32) -> ContextSpec {
    let (min_tokens, max_tokens) = (Some(256), Some(max_tokens));
    ContextSpec { sizing: ContextSizing::Fixed, min_tokens, max_tokens, parallel, ..ContextSpec::default() }
}

/// Ten ways of serving small models whose contexts are large: what can be wrong with a prediction is not their weights.
fn cases() -> Vec<Case> {
    // 16 KiB of KV a token, and little to compute.
    let spec = Spec { layers: 4, embd: 1024, heads: 8, kv_heads: 8, ff: 256, context: 1 << 17, ..Spec::default() };
    let case = |name, context: ContextSpec, prompt| Case {
        name,
        spec: spec.clone(),
        context,
        engine: EngineSpec::default(),
        device: "CPU",
        gpu_layers: None,
        prompt,
    };
    let micro_batch = |tokens| EngineSpec { micro_batch_tokens: Some(tokens), ..EngineSpec::default() };
    // Small batches and no flash attention need few shaders.
    let few = EngineSpec {
        batch_tokens: Some(32),
        micro_batch_tokens: Some(32),
        flash_attention: FlashAttention::Off,
        ..EngineSpec::default()
    };
    let dynamic = ContextSpec { min_tokens: Some(4096), max_tokens: Some(4096), ..ContextSpec::default() };
    let q8 = ContextSpec { key_cache_type: CacheType::Q8_0, value_cache_type: CacheType::Q8_0, ..fixed(32_768, 1) };
    let thin = Spec { layers: 2, embd: 256, heads: 2, kv_heads: 2, ff: 256, ..spec.clone() };
    vec![
        case("4k, dynamic", dynamic, 4000),
        // Masks for so many cells are large, and touched as far as cells are used; scores are too, and larger.
        Case {
            engine: EngineSpec { flash_attention: FlashAttention::On, ..micro_batch(64) },
            spec: thin.clone(),
            ..case("128k", fixed(131_072, 1), 600)
        },
        case("8 times 4k", fixed(4096, 8), 600),
        Case { engine: micro_batch(128), ..case("32k of Q8_0", q8, 600) },
        Case { engine: micro_batch(128), ..case("small steps", fixed(32_768, 1), 600) },
        Case {
            engine: EngineSpec { flash_attention: FlashAttention::Off, ..EngineSpec::default() },
            ..case("no flash attention", fixed(4096, 1), 4000)
        },
        Case {
            spec: Spec { architecture: Architecture::Gemma3, layers: 6, ..spec.clone() },
            ..case("a window", fixed(8192, 1), 600)
        },
        Case { spec: Spec { vocab: 65_536, ..thin }, ..case("a large vocabulary", fixed(4096, 2), 600) },
        Case { engine: few.clone(), device: DEVICE, ..case("on a GPU", fixed(16_384, 1), 200) },
        Case { engine: few, device: DEVICE, gpu_layers: Some(2), ..case("half on a GPU", fixed(16_384, 1), 200) },
    ]
}

/// Anonymous and shared memory of a process, in bytes. On this driver device memory is among it.
fn held(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let kib = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    (kib("RssAnon:") + kib("RssShmem:")) * 1024
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn sum(memory: &[MemoryUse], of: impl Fn(&MemoryUse) -> u64) -> u64 {
    memory.iter().map(of).sum()
}

/// Bytes of one worker, predicted and when it has answered.
struct Taken {
    /// Of llama.cpp's own buffers.
    llama: [u64; 2],
    /// Of the process.
    process: [u64; 2],
    /// Of the device: as the worker says, and by the driver's account, where that is a test's.
    device: Option<[u64; 2]>,
}

impl Taken {
    async fn by(case: &Case) -> Self {
        let Case { name, spec, context, engine, device, gpu_layers, prompt } = case;
        let folder = folder();
        let path = folder.path().join("model.gguf");
        spec.write(&path).expect("a model");
        // A GPU's own driver keeps an account.
        let accounts =
            (*device != "CPU" && !cfg!(feature = "cuda")).then(|| Accounts::new().expect("the device's account"));
        let shared: Vec<_> = ENV.into_iter().chain(accounts.iter().flat_map(Accounts::environment)).collect();
        let environment: &[_] = if *device == "CPU" { &[] } else { &shared };
        let (devices, gpu_layers) = (vec![(*device).to_owned()], *gpu_layers);
        let (context, engine) = (context.clone(), engine.clone());
        let config = RunnerConfig { devices, gpu_layers, context, engine, ..config(folder.path(), path) };
        let input = serde_json::to_string(&config).expect("JSON");
        let estimator = Worker::start(folder.path(), &["--estimate"], environment, &input);
        let line = estimator.line().unwrap_or_else(|| panic!("no estimate: {}", estimator.log()));
        let estimate: EstimateReport = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        drop(estimator);
        let mut worker = Worker::serve(folder.path(), &config, environment);
        let report = worker.ready();
        let prompt: Vec<usize> = (0..*prompt).map(|number| 260 + number % 240).collect();
        let body = json!({"model": "test", "prompt": prompt, "max_tokens": 2});
        let (status, answer) = post(&config.socket, "/v1/completions", &body).await;
        assert_eq!(status, 200, "{name}: {answer}; {}", worker.log());

        // Of a real GPU, memory is not among the process's own.
        let apart = |part: &MemoryUse| if cfg!(feature = "cuda") && part.device == DEVICE { part.total() } else { 0 };
        let whole = held(worker.child.id()) + sum(&report.memory, |part| part.mapped_bytes + apart(part));
        let of_llama = |part: &MemoryUse| part.weights_bytes + part.context_bytes + part.compute_bytes;
        let taken = Self {
            llama: [sum(&estimate.memory, of_llama), sum(&report.memory, of_llama)],
            process: [sum(&estimate.memory, MemoryUse::total), whole],
            device: accounts.as_ref().map(|accounts| {
                let on_device = report.memory.iter().filter(|part| part.device == *device);
                [on_device.map(MemoryUse::total).sum(), accounts.held().expect("the account")]
            }),
        };
        let Self { llama, process, device } = &taken;
        let ([of_llama, its], [predicted, whole]) = (llama.map(mib), process.map(mib));
        println!(
            "{name:<20} llama.cpp's {of_llama:.1} of {its:.1} MiB, the process {predicted:.1} of {whole:.1} MiB, \
             the device {device:?}; {:?}",
            report.memory
        );
        worker.signal(rustix::process::Signal::TERM);
        assert_eq!(worker.wait().code(), Some(0), "{}", worker.log());
        taken
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn ten_configurations_take_what_was_predicted() {
    let cases = cases();
    assert_eq!(cases.len(), 10);
    // What a driver takes for each process, whatever its context is: this one compiles its shaders into host memory.
    let on_gpu = cases.iter().find(|case| case.device != "CPU").expect("a GPU");
    let small = Case { name: "the driver's part", context: fixed(1024, 1), ..on_gpu.clone() };
    let [predicted, whole] = Taken::by(&small).await.process;
    let drivers = whole.saturating_sub(predicted);
    let mut wrong = Vec::new();
    for case in cases {
        let Taken { llama: [of_llama, its], process: [mut predicted, whole], device } = Taken::by(&case).await;
        // The software driver's shaders make no copy of the scores, which is 8 MiB of both cases.
        let differ = |[said, held]: &[u64; 2]| said.abs_diff(*held) > (held / 100 * 3).max(16 << 20);
        if let Some([said, held]) = device.filter(differ) {
            wrong.push(format!("{}: {said} of {held} bytes by the driver's account", case.name));
        }
        if case.device != "CPU" {
            predicted += drivers;
        }
        let error = predicted.abs_diff(whole);
        if of_llama.abs_diff(its) * 100 > its || (error * 100 > whole * 3 && error > 64 << 20) {
            let name = case.name;
            wrong.push(format!("{name}: {of_llama} of {its} bytes, the process {predicted} of {whole}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
