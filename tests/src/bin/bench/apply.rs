//! From apply to Ready and to the first token, for a toy model whose file is on the node; on an empty node and beside
//! 20 other models. And what operator and agent take while nothing is there.

use std::time::{Duration, Instant};

use altiplano_crds::ModelDeployment;
use altiplano_crds::conditions::types;
use altiplano_tests::report::{Report, Row};
use altiplano_tests::scenario::{SOON, Scenario, toy_question};
use altiplano_tests::{chat, wait_for};
use anyhow::Result;
use kube::Api;
use kube::api::PostParams;

const RUNS: usize = 50;
const OTHERS: usize = 20;
/// A node that has settled is what a user applies to: an agent writes its status once a second on average, and runs
/// back to back would measure that limit.
const SETTLE: Duration = Duration::from_secs(4);
const MIB: f64 = 1024.0 * 1024.0;

pub(crate) async fn run() -> Result<Report> {
    let world = Scenario::start("bench-apply", 1).await?;
    let mut rows = Vec::new();
    // At rest: after the start-up's last allocation has been given back.
    tokio::time::sleep(Duration::from_secs(5)).await;
    #[expect(clippy::cast_precision_loss, reason = "memory in MiB needs no 52 bits")]
    let mib = |bytes: u64| bytes as f64 / MIB;
    rows.push(Row::new("operator at rest, resident", "MiB", mib(world.operator.proc.resident_bytes()?)).below(40.0));
    rows.push(
        Row::new("agent without models, resident", "MiB", mib(world.agents[0].proc.resident_bytes()?)).below(60.0),
    );

    measure(&world, "empty node", &mut rows).await?;
    let others: Vec<_> = (0..OTHERS).map(|n| world.toy(&format!("other-{n}"), "unload: {policy: Never}")).collect();
    world.apply(&others.join("\n---\n"))?;
    for n in 0..OTHERS {
        world.wait_for_ready(&format!("other-{n}"), "1/1").await?;
    }
    measure(&world, "beside 20 models", &mut rows).await?;
    for n in 0..OTHERS {
        world.delete(&format!("other-{n}")).await?;
    }
    Ok(Report {
        name: "apply".into(),
        setting: format!(
            "{RUNS} runs each, {SETTLE:?} after the one before was gone; toy model by file://, CPU, {} cores, development build; kube-apiserver, etcd and \
             kube-controller-manager share the machine. Ready: status.conditions[Ready] is True and the endpoint is in \
             its slice.",
            std::thread::available_parallelism().map_or(0, usize::from)
        ),
        rows,
    })
}

async fn measure(world: &Scenario, place: &str, rows: &mut Vec<Row>) -> Result<()> {
    let (prompt, _) = toy_question(0)?;
    let models = Api::<ModelDeployment>::namespaced(world.client.clone(), &world.namespace);
    let (mut ready, mut first_token) = (Vec::new(), Vec::new());
    for run in 0..RUNS {
        tokio::time::sleep(SETTLE).await;
        let name = format!("run-{}-{run}", rows.len());
        // kubectl's own start would be measured with it: the same request without it.
        let model = serde_saphyr::from_str(&world.toy(&name, ""))?;
        let begun = Instant::now();
        models.create(&PostParams::default(), &model).await?;
        wait_for(format!("{name} to be ready"), SOON, || async {
            let model = models.get(&name).await.map_err(|error| error.to_string())?;
            let conditions = model.status.map(|status| status.conditions).unwrap_or_default();
            let ready = conditions.iter().any(|c| c.type_ == types::READY && c.status == "True");
            if ready { Ok(()) } else { Err(format!("{conditions:?}")) }
        })
        .await?;
        let endpoint = world.wait_for_endpoints(&name, 1).await?.remove(0);
        ready.push(begun.elapsed());
        let asked = begun.elapsed();
        first_token.push(asked + chat(&endpoint.url, &name, &prompt, |_| ()).await?.first_token);
        world.delete(&name).await?;
    }
    for (what, times) in [("Ready", &mut ready), ("first token", &mut first_token)] {
        times.sort();
        let spread = percentile(times, 75).as_secs_f64() - percentile(times, 25).as_secs_f64();
        let row =
            |p: usize| Row::new(format!("apply to {what}, {place}, p{p}"), "s", percentile(times, p).as_secs_f64());
        let (p50, p99) = (row(50).below(1.0).spread(spread), row(99).below(2.0));
        eprintln!("{place}, {what}: p50 {:.3} s, p99 {:.3} s", p50.ours, p99.ours);
        rows.extend([p50, p99]);
    }
    Ok(())
}

/// The nearest-rank percentile of sorted times.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}
