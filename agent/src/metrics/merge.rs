//! Several text expositions into one.
//!
//! The format wants each family once, with one HELP and one TYPE, all its samples together, and each series once. The
//! workers speak the same families with different labels, so their samples go side by side. Two workers of the same
//! model (one drains while its successor serves) have equal series: counters and histograms add up, and so do gauges,
//! except shares (`…_perc`, `…_ratio`), of which the higher is kept.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

/// An exposition that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// A line that is neither a comment nor a sample.
    #[error("line {line} is not in the text format")]
    Malformed {
        /// Counted from 1.
        line: usize,
    },
    /// The same family has two types.
    #[error("{family} is a {had} and a {got}")]
    TypeConflict {
        /// Name of the family.
        family: String,
        /// Type seen first.
        had: String,
        /// Type seen later.
        got: String,
    },
    /// More series than an agent with its models can have.
    #[error("more than {0} series")]
    TooManySeries(usize),
}

/// Series over all families that one exposition may hold.
const MAX_SERIES: usize = 200_000;

#[derive(Default)]
struct Family {
    help: String,
    kind: String,
    /// In the order they came: buckets of a histogram stay in theirs.
    series: Vec<(String, f64)>,
    index: HashMap<String, usize>,
}

/// Families by name.
#[derive(Default)]
pub struct Exposition {
    families: BTreeMap<String, Family>,
    series: usize,
}

impl Exposition {
    /// Adds all families of `text`. On an error nothing is added.
    pub fn add(&mut self, text: &str) -> Result<(), MergeError> {
        let parsed = parse(text)?;
        for (name, family) in &parsed {
            if let Some(had) = self.families.get(name)
                && had.kind != family.kind
            {
                let (had, got) = (had.kind.clone(), family.kind.clone());
                return Err(MergeError::TypeConflict { family: name.clone(), had, got });
            }
        }
        let added: usize = parsed.iter().map(|(_, family)| family.series.len()).sum();
        if self.series + added > MAX_SERIES {
            return Err(MergeError::TooManySeries(MAX_SERIES));
        }
        self.series += added;
        for (name, family) in parsed {
            let keeps_higher =
                family.kind == "gauge" && ["_perc", "_ratio"].iter().any(|suffix| name.ends_with(suffix));
            let into = self.families.entry(name).or_default();
            if into.help.is_empty() {
                into.help = family.help;
            }
            into.kind = family.kind;
            for (series, value) in family.series {
                match into.index.get(&series).and_then(|at| into.series.get_mut(*at)) {
                    Some((_, sum)) if keeps_higher => *sum = sum.max(value),
                    Some((_, sum)) => *sum += value,
                    None => {
                        into.index.insert(series.clone(), into.series.len());
                        into.series.push((series, value));
                    }
                }
            }
        }
        Ok(())
    }

    /// The text exposition, families in the order of their names.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        for (name, family) in &self.families {
            // Writing to a String cannot fail.
            if !family.help.is_empty() {
                let _ = writeln!(text, "# HELP {name} {}", family.help);
            }
            let _ = writeln!(text, "# TYPE {name} {}", family.kind);
            for (series, value) in &family.series {
                let _ = writeln!(text, "{series} {}", Number(*value));
            }
        }
        text
    }
}

/// Writes infinities as the format wants them.
struct Number(f64);

impl std::fmt::Display for Number {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == f64::INFINITY {
            formatter.write_str("+Inf")
        } else if self.0 == f64::NEG_INFINITY {
            formatter.write_str("-Inf")
        } else {
            self.0.fmt(formatter)
        }
    }
}

fn parse(text: &str) -> Result<Vec<(String, Family)>, MergeError> {
    let mut families: Vec<(String, Family)> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let malformed = || MergeError::Malformed { line: at + 1 };
        let line = line.trim();
        if let Some(comment) = line.strip_prefix('#') {
            let (word, rest) = comment.trim_start().split_once(' ').unwrap_or_default();
            if word == "HELP" || word == "TYPE" {
                let (name, what) = rest.split_once(' ').unwrap_or((rest, ""));
                let family = family(&mut families, name);
                let field = if word == "HELP" { &mut family.help } else { &mut family.kind };
                what.clone_into(field);
            }
            continue;
        }
        if line.is_empty() {
            continue;
        }
        let (series, value) = split_sample(line).ok_or_else(malformed)?;
        let name = series.split('{').next().unwrap_or(series);
        let into = match families.last_mut() {
            Some((last, family)) if belongs(name, last, &family.kind) => family,
            _ => {
                let family = family(&mut families, name);
                if family.kind.is_empty() {
                    "untyped".clone_into(&mut family.kind);
                }
                family
            }
        };
        into.series.push((series.to_owned(), value));
    }
    for (_, family) in &mut families {
        if family.kind.is_empty() {
            "untyped".clone_into(&mut family.kind);
        }
    }
    Ok(families)
}

/// Whether a sample of this name is one of `family`, whose type is `kind`.
fn belongs(sample: &str, family: &str, kind: &str) -> bool {
    match sample.strip_prefix(family) {
        Some("") => true,
        Some("_sum" | "_count") => kind == "histogram" || kind == "summary",
        Some("_bucket") => kind == "histogram",
        _ => false,
    }
}

fn family<'f>(families: &'f mut Vec<(String, Family)>, name: &str) -> &'f mut Family {
    // A well-formed exposition names the family that came last, or a new one.
    let known = families.iter().rposition(|(known, _)| known == name);
    let at = known.unwrap_or(families.len());
    if known.is_none() {
        families.push((name.to_owned(), Family::default()));
    }
    &mut families[at].1
}

/// `name{labels}` and the value; a timestamp after it is dropped. Label values may hold spaces and braces.
fn split_sample(line: &str) -> Option<(&str, f64)> {
    let end = match line.find('{') {
        Some(open) => {
            let mut quoted = false;
            let mut escaped = false;
            line[open..].char_indices().find_map(|(at, letter)| {
                match letter {
                    _ if escaped => escaped = false,
                    '\\' if quoted => escaped = true,
                    '"' => quoted = !quoted,
                    '}' if !quoted => return Some(open + at + 1),
                    _ => {}
                }
                None
            })?
        }
        None => line.find(' ')?,
    };
    let (series, rest) = line.split_at_checked(end)?;
    let value = rest.split_ascii_whitespace().next()?;
    let named = series.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_' || first == ':');
    named.then_some(())?;
    Some((series, value.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(texts: &[&str]) -> String {
        let mut exposition = Exposition::default();
        for text in texts {
            exposition.add(text).unwrap();
        }
        exposition.render()
    }

    #[test]
    fn families_come_once_with_the_samples_of_all() {
        let a = "# HELP x_total Things.\n# TYPE x_total counter\nx_total{model_name=\"a\"} 3\n\
                 # HELP h Seconds.\n# TYPE h histogram\nh_bucket{model_name=\"a\",le=\"0.5\"} 1\n\
                 h_bucket{model_name=\"a\",le=\"+Inf\"} 2\nh_sum{model_name=\"a\"} 1.25\nh_count{model_name=\"a\"} 2\n";
        let b = a.replace("\"a\"", "\"b {odd} \\\" name\"");
        insta::assert_snapshot!(merged(&[a, &b, "# HELP g A gauge.\n# TYPE g gauge\ng 1\n"]), @r##"
        # HELP g A gauge.
        # TYPE g gauge
        g 1
        # HELP h Seconds.
        # TYPE h histogram
        h_bucket{model_name="a",le="0.5"} 1
        h_bucket{model_name="a",le="+Inf"} 2
        h_sum{model_name="a"} 1.25
        h_count{model_name="a"} 2
        h_bucket{model_name="b {odd} \" name",le="0.5"} 1
        h_bucket{model_name="b {odd} \" name",le="+Inf"} 2
        h_sum{model_name="b {odd} \" name"} 1.25
        h_count{model_name="b {odd} \" name"} 2
        # HELP x_total Things.
        # TYPE x_total counter
        x_total{model_name="a"} 3
        x_total{model_name="b {odd} \" name"} 3
        "##);
    }

    #[test]
    fn equal_series_add_up_and_shares_keep_the_higher() {
        let worker =
            "# TYPE c_total counter\nc_total 2\n# TYPE running gauge\nrunning 1\n# TYPE kv_perc gauge\nkv_perc 0.5\n";
        let other = worker.replace("0.5", "0.25");
        insta::assert_snapshot!(merged(&[worker, &other]), @r"
        # TYPE c_total counter
        c_total 4
        # TYPE kv_perc gauge
        kv_perc 0.5
        # TYPE running gauge
        running 2
        ");
    }

    #[test]
    fn what_cannot_be_read_adds_nothing() {
        let mut exposition = Exposition::default();
        exposition.add("# TYPE c counter\nc 1\n").unwrap();
        let before = exposition.render();
        let cases = [
            ("# TYPE d counter\nd 1\nnonsense\n", MergeError::Malformed { line: 3 }),
            ("d{a=\"1\" 5\n", MergeError::Malformed { line: 1 }),
            ("d one\n", MergeError::Malformed { line: 1 }),
            ("{a=\"1\"} 1\n", MergeError::Malformed { line: 1 }),
            (
                "# TYPE d gauge\nd 1\n# TYPE c gauge\nc 1\n",
                MergeError::TypeConflict { family: "c".into(), had: "counter".into(), got: "gauge".into() },
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(exposition.add(text), Err(expected), "{text}");
            assert_eq!(exposition.render(), before, "{text}");
        }
    }

    #[test]
    fn a_counter_that_ends_like_a_histogram_stays_a_counter() {
        let text = "# TYPE a counter\na 1\n# TYPE a_sum counter\na_sum 2\n";
        assert_eq!(merged(&[text]), text);
    }
}
