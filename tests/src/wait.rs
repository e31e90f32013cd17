//! Waiting with an end.

use std::{
    fmt::Display,
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tokio::time::{sleep, timeout};

const PAUSE: Duration = Duration::from_millis(25);

/// Asks `probe` again and again until it returns `Ok`; its `Err` is what it saw instead. After `limit` the error says
/// what was waited for and what was seen last.
pub async fn wait_for<T, Seen, Probe, Answer>(what: impl Display, limit: Duration, mut probe: Probe) -> Result<T>
where
    Seen: Display,
    Probe: FnMut() -> Answer,
    Answer: Future<Output = Result<T, Seen>>,
{
    let start = Instant::now();
    let mut seen = String::from("nothing: it never answered");
    loop {
        match timeout(limit.saturating_sub(start.elapsed()), probe()).await {
            Ok(Ok(value)) => return Ok(value),
            // `{:#}` so that an error tells its whole chain.
            Ok(Err(other)) => seen = format!("{other:#}"),
            Err(_) => bail!("waited {limit:?} for {what}; the last question is unanswered, before it: {seen}"),
        }
        if start.elapsed() + PAUSE >= limit {
            bail!("waited {limit:?} for {what}; seen instead: {seen}");
        }
        sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_error_says_what_was_seen() {
        let mut count = 0;
        let error = wait_for("ten", Duration::from_millis(200), || {
            count += 1;
            std::future::ready(Err::<(), _>(format!("{count} of ten")))
        })
        .await
        .unwrap_err()
        .to_string();
        assert!(error.contains("for ten") && error.contains(&format!("{count} of ten")), "{error}");
    }

    #[tokio::test]
    async fn a_question_without_an_answer_ends_too() {
        let hang = || std::future::pending::<Result<(), String>>();
        let error = wait_for("an answer", Duration::from_millis(50), hang).await.unwrap_err().to_string();
        assert!(error.contains("never answered"), "{error}");
    }
}
