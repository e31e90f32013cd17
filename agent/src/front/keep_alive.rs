//! Ollama's `keep_alive`: how long a client wants a model to stay in memory after its request.
//!
//! The last one that was said counts for as long as the model stays loaded, in place of the time of its unload policy.
//! A model whose policy is `Never` stays: what the ModelDeployment pins, no client unpins. A model that is to stay for
//! ever is not unloaded for being idle; it may still have to make room for another.

use std::time::Duration;

use jiff::SignedDuration;
use serde_json::Value;

use crate::api::{ApiError, clip};

/// Longer than this is for ever.
const LONGEST: Duration = Duration::from_hours(10 * 365 * 24);

/// How long a model stays loaded after its last request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepAlive {
    /// For this long; zero: it goes when its requests have ended.
    For(Duration),
    /// As long as nobody else needs the room.
    Forever,
}

impl KeepAlive {
    /// Seconds as a number, or a duration such as "5m", "1h30m" or "300ms"; whatever is negative means for ever. Absent
    /// and null say nothing.
    pub(super) fn read(value: Option<&Value>) -> Result<Option<Self>, ApiError> {
        let wrong = |got: &str| {
            let message = format!(
                "'keep_alive' must be a number of seconds or a duration such as \"5m\", \"0\" or \"-1\", not {got}"
            );
            ApiError::invalid("keep_alive", message)
        };
        let seconds = |seconds: f64| {
            if seconds < 0.0 {
                Some(Self::Forever)
            } else {
                Duration::try_from_secs_f64(seconds).ok().map(Self::of).or(Some(Self::Forever))
            }
        };
        let read = match value {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Number(number)) => number.as_f64().and_then(seconds),
            Some(Value::String(text)) => match text.trim().parse::<f64>() {
                Ok(number) if number.is_finite() => seconds(number),
                Ok(_) => None,
                Err(_) => text
                    .trim()
                    .parse::<SignedDuration>()
                    .ok()
                    .map(|duration| Duration::try_from(duration).map_or(Self::Forever, Self::of)),
            },
            Some(_) => None,
        };
        let got = || value.map_or_else(String::new, |value| clip(&value.to_string()).into_owned());
        read.map(Some).ok_or_else(|| wrong(&got()))
    }

    fn of(duration: Duration) -> Self {
        if duration > LONGEST { Self::Forever } else { Self::For(duration) }
    }

    /// Whether the model is to go at once.
    pub(super) fn is_unload(self) -> bool {
        self == Self::For(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_and_durations() {
        let seconds = |seconds| KeepAlive::For(Duration::from_secs(seconds));
        for (given, expected) in [
            (json!(300), seconds(300)),
            (json!(1.5), KeepAlive::For(Duration::from_millis(1500))),
            (json!(0), seconds(0)),
            (json!(-0.0), seconds(0)),
            (json!(-1), KeepAlive::Forever),
            (json!(1e300), KeepAlive::Forever),
            (json!("5m"), seconds(300)),
            (json!("1h30m"), seconds(5400)),
            (json!("1.5h"), seconds(5400)),
            (json!("300ms"), KeepAlive::For(Duration::from_millis(300))),
            (json!("24h"), seconds(86_400)),
            (json!("0"), seconds(0)),
            (json!("0s"), seconds(0)),
            (json!("-1"), KeepAlive::Forever),
            (json!("-1m"), KeepAlive::Forever),
            (json!("1000000h"), KeepAlive::Forever),
        ] {
            assert_eq!(KeepAlive::read(Some(&given)).unwrap(), Some(expected), "{given}");
        }
        assert_eq!(KeepAlive::read(None).unwrap(), None);
        assert_eq!(KeepAlive::read(Some(&Value::Null)).unwrap(), None);
        assert!(KeepAlive::For(Duration::ZERO).is_unload() && !KeepAlive::Forever.is_unload());
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for bad in [json!("soon"), json!(""), json!("nan"), json!("inf"), json!(true), json!({}), json!([1])] {
            let error = KeepAlive::read(Some(&bad)).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some("keep_alive")), "{bad}");
        }
    }
}
