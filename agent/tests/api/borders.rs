//! Models whose state cannot be cut: the next turn of a conversation goes on from where a message ends.

use altiplano_test_models::{Architecture, Spec};
use serde_json::{Value, json};

use super::{CHAT, Node};

/// A text of some hundred tokens, another for each number.
fn essay(number: usize) -> String {
    let words: Vec<String> = (0..40).map(|word| format!("word{}", (number * 7919 + word * 104_729) % 1000)).collect();
    words.join(" ") + "."
}

impl Node {
    async fn tokens(&self, text: &str) -> usize {
        let body = json!({"content": text, "parse_special": true, "add_special": false});
        self.json("/tokenize", &body).await["tokens"].as_array().unwrap().len()
    }

    /// Tokens of the prompt that were not read anew, and all of them.
    async fn cached(&self, messages: &[Value]) -> (u64, u64) {
        let body = json!({"model": "toy-chat", "messages": messages, "max_tokens": 8});
        let answer = self.json(CHAT, &body).await;
        let usage = &answer["usage"];
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        (cached, usage["prompt_tokens"].as_u64().unwrap())
    }
}

/// The answers that the client sends back are not what the model wrote, as where reasoning was taken out of them.
#[tokio::test]
async fn the_next_turn_goes_on_where_a_message_ends() {
    let reasons = include_str!("../templates/qwen3.jinja");
    for (architecture, template) in
        [(Architecture::Mamba, None), (Architecture::Qwen35, None), (Architecture::Qwen35, Some(reasons))]
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        Spec { architecture, layers: 4, context: 8192, ..Spec::default() }.write(&path).unwrap();
        let node = Node::start_with(|config| {
            config.model_path.clone_from(&path);
            config.chat_template = template.map(str::to_owned);
            config.context.max_tokens = Some(8192);
            config.context.min_tokens = Some(8192);
        })
        .await;
        let said = |role: &str, text: String| json!({"role": role, "content": text});
        let before = |text: &str| format!("<|im_start|>user\n{text}");
        let mut messages = vec![said("user", essay(1))];
        assert_eq!(node.cached(&messages).await.0, 0, "{architecture:?}");

        // The answer as the client knows it.
        messages.push(said("assistant", essay(100)));
        messages.push(said("user", essay(2)));
        let first = node.tokens(&before(&essay(1))).await as u64;
        let (cached, second) = node.cached(&messages).await;
        assert_eq!(cached, first, "{architecture:?}: the end of the first message, of {second}");

        messages.push(json!({"role": "assistant", "content": essay(101), "reasoning_content": essay(102)}));
        messages.push(said("user", essay(3)));
        let (cached, third) = node.cached(&messages).await;
        assert!(
            cached > second - 16 && cached < second,
            "{architecture:?}: {cached} of {third}, where {second} were read"
        );

        // Another last question goes on from the answer before it.
        messages.pop();
        messages.push(said("user", essay(4)));
        let (cached, fourth) = node.cached(&messages).await;
        let answer = node.tokens(&format!("<|im_end|>\n<|im_start|>assistant\n{}", essay(101))).await as u64;
        assert!(
            cached >= second + answer - 32 && cached < fourth,
            "{architecture:?}: {cached} of {fourth}, after {second}"
        );

        // The same again: at most the few tokens behind the last message are read.
        let (cached, again) = node.cached(&messages).await;
        assert!(cached > again - 16, "{architecture:?}: {cached} of {again}");
    }
}
