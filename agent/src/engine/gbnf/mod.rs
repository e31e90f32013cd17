//! Pure: llama.cpp's GBNF, followed byte by byte.
//!
//! llama.cpp's own matcher aborts the process when it is fed what it does not allow, takes exponential time and memory on
//! grammars that anybody can write, and looks at every token of the vocabulary each time. This one takes the same grammars
//! and is bounded in each of its steps: [`parse`] bounds size and depth, [`Matcher`] the work for one mask. Its states are
//! found once and kept, and a mask is one walk over the trie of the vocabulary.

mod matcher;
mod parse;
mod program;

pub(super) use matcher::Matcher;
pub(super) use parse::MAX_SOURCE_BYTES;

#[cfg(test)]
mod tests;
