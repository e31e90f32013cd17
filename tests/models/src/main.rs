//! Writes model files with random weights, good and bad ones.

use std::path::PathBuf;

use altiplano_test_models::{Architecture, BadFile, Error, MtpHead, Pooling, Quantization, Spec, Tokenizer};
use clap::Parser;

#[derive(Parser)]
#[command(about)]
enum Command {
    /// Writes a model with random weights.
    Generate(Generate),
    /// Writes a file that must be refused.
    Bad {
        /// What is wrong with it.
        kind: BadFile,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(clap::Args)]
struct Generate {
    /// File to write.
    #[arg(long)]
    out: PathBuf,
    /// Start from a well-known shape; the other options change it.
    #[arg(long, value_parser = ["1b", "3b", "8b", "embedder", "reranker", "causal-embedder"])]
    preset: Option<String>,
    #[arg(long)]
    architecture: Option<Architecture>,
    #[arg(long)]
    name: Option<String>,
    #[arg(long)]
    vocab: Option<u32>,
    #[arg(long)]
    layers: Option<u32>,
    #[arg(long)]
    embd: Option<u32>,
    #[arg(long)]
    heads: Option<u32>,
    #[arg(long)]
    kv_heads: Option<u32>,
    #[arg(long)]
    ff: Option<u32>,
    /// Feed-forward parts of which a token passes two (llama only).
    #[arg(long)]
    experts: Option<u32>,
    #[arg(long)]
    context: Option<u32>,
    #[arg(long)]
    sliding_window: Option<u32>,
    #[arg(long)]
    quantization: Option<Quantization>,
    #[arg(long)]
    tokenizer: Option<Tokenizer>,
    /// Makes an embedder or a reranker.
    #[arg(long)]
    pooling: Option<Pooling>,
    /// A head that guesses the token after the next one (qwen35 only).
    #[arg(long)]
    mtp: Option<MtpHead>,
    /// File that holds a Jinja chat template.
    #[arg(long)]
    chat_template: Option<PathBuf>,
    /// Let the model end by itself.
    #[arg(long)]
    may_end: bool,
    #[arg(long)]
    seed: Option<u64>,
}

impl Generate {
    fn spec(&self) -> Result<Spec, Error> {
        let base = self.preset.as_deref().and_then(Spec::preset).unwrap_or_default();
        let chat_template = match &self.chat_template {
            Some(path) => Some(std::fs::read_to_string(path)?),
            None => base.chat_template,
        };
        Ok(Spec {
            architecture: self.architecture.unwrap_or(base.architecture),
            name: self.name.clone().unwrap_or(base.name),
            vocab: self.vocab.unwrap_or(base.vocab),
            layers: self.layers.unwrap_or(base.layers),
            embd: self.embd.unwrap_or(base.embd),
            heads: self.heads.unwrap_or(base.heads),
            kv_heads: self.kv_heads.unwrap_or(base.kv_heads),
            ff: self.ff.unwrap_or(base.ff),
            experts: self.experts.unwrap_or(base.experts),
            context: self.context.unwrap_or(base.context),
            sliding_window: self.sliding_window.unwrap_or(base.sliding_window),
            long_rope: base.long_rope,
            quantization: self.quantization.unwrap_or(base.quantization),
            tokenizer: self.tokenizer.unwrap_or(base.tokenizer),
            chat_template,
            pooling: self.pooling.or(base.pooling),
            endless: !self.may_end && base.endless,
            mtp: self.mtp.or(base.mtp),
            infill: base.infill,
            seed: self.seed.unwrap_or(base.seed),
        })
    }
}

fn main() -> Result<(), Error> {
    match Command::parse() {
        Command::Generate(generate) => {
            let spec = generate.spec()?;
            let bytes = spec.write(&generate.out)?;
            println!("{}: {bytes} bytes, {} parameters", generate.out.display(), spec.parameters());
        }
        Command::Bad { kind, out } => kind.write(&Spec::default(), &out)?,
    }
    Ok(())
}
