//! llama-server's own endpoints, in the shapes of its README.
//!
//! | path | | where |
//! |---|---|---|
//! | `POST /completion` (`/completions`) | a prompt of text, tokens, or both; its options and its answer | [`completion`] |
//! | `POST /infill` | what stands between `input_prefix` and `input_suffix`; 400 for a model without FIM tokens | [`infill`] |
//! | `POST /tokenize`, `/detokenize` | `add_special`, `parse_special`, `with_pieces` | [`tokens`] |
//! | `POST /apply-template` | the prompt that a chat request would have | [`tokens`] |
//! | `GET /props` | the model, its template, the defaults | [`props`] |
//! | `GET /slots` | as many as requests can run; `?fail_on_no_slot=1` is 503 when all do | [`props`] |
//!
//! What differs, because something else decides here: slots have no identity (`id_slot` is ignored and always -1),
//! `model_path` is the file's name alone, nothing is truncated (a prompt that is too long is 400), `POST /props` and the
//! saving and restoring of slots are not there.

pub(super) mod answer;
pub(super) mod completion;
pub(super) mod infill;
pub(super) mod props;
pub(super) mod tokens;
