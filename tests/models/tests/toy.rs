//! The toy model's files agree with each other. What the model says is the engine's test.

use altiplano_test_models::toy;

#[test]
fn the_committed_files_belong_together() {
    let length = std::fs::metadata(toy::path()).expect("toy/altiplano-toy.gguf is committed").len();
    assert!((1 << 20..8 << 20).contains(&length), "{length} bytes");
    assert_eq!(toy::SHA256.len(), 64);

    let questions = toy::questions();
    assert!(questions.len() >= 60, "{}", questions.len());
    for question in &questions {
        assert_ne!(question.messages.is_empty(), question.prompt.is_none(), "a chat or a prompt: {question:?}");
        assert!(
            question.prompt.is_some() || question.messages.last().is_some_and(|m| m.role == "user"),
            "{question:?}"
        );
        assert!(!question.answer.is_empty());
    }
    let is_asked = |text: &str| questions.iter().any(|q| q.messages.last().is_some_and(|m| m.content == text));
    assert!(is_asked(toy::LONG_QUESTION));
}
