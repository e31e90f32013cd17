use std::time::{Duration, Instant};

use llguidance::toktrie::{SimpleVob, TokRxInfo, TokTrie};

use super::Matcher;

/// Longest that anything may take; what is usual here is a hundredth of it.
const PATIENCE: Duration = Duration::from_mins(2);

fn matcher(source: &str) -> Result<Matcher, String> {
    Matcher::new(source, &|text| (text == "<|think|>").then_some(300))
}

/// All single bytes, then these.
fn trie(words: &[&str]) -> TokTrie {
    let mut all: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    all.extend(words.iter().map(|word| word.as_bytes().to_vec()));
    TokTrie::from(&TokRxInfo::new(u32::try_from(all.len()).unwrap(), 0), &all)
}

/// How far a text is allowed, and whether it may end there and must.
fn follow(source: &str, text: &str) -> (usize, bool, bool) {
    let mut matcher = matcher(source).unwrap_or_else(|error| panic!("{source}: {error}"));
    let taken = text.bytes().take_while(|&byte| matcher.push_bytes(&[byte]).is_ok()).count();
    (taken, matcher.is_accepting(), matcher.is_complete())
}

const JSON: &str = r#"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws # a text
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn texts_are_followed_as_far_as_they_are_allowed() {
    // Grammar, text, bytes taken, may end, must end.
    let cases: &[(&str, &str, usize, bool, bool)] = &[
        (r#"root ::= "abc""#, "abc", 3, true, true),
        (r#"root ::= "abc""#, "abd", 2, false, false),
        (r#"root ::= "a"*"#, "aaab", 3, true, false),
        (r#"root ::= "a"+"#, "", 0, false, false),
        (r#"root ::= "ab"{2}"#, "abab", 4, true, true),
        (r#"root ::= "a"{2,3}"#, "aaaa", 3, true, true),
        (r#"root ::= "a"{2,}"#, "aaaaaaa", 7, true, false),
        (r#"root ::= "a"{0,5000}"#, &"a".repeat(6000), 6000, true, false),
        (r#"root ::= ("x" | "y" "z"?)+ "!""#, "xyzx!", 5, true, true),
        ("root ::= [a-c]+ [^a-c]", "abcd", 4, true, true),
        ("root ::= [a-] | [\\x41\\u00e9\\]]", "-", 1, true, true),
        ("root ::= [^é☃]+", "aëü☃", 7, false, false),
        ("root ::= [é☃😀]", "😀", 4, true, true),
        ("root ::= .", "é", 2, true, true),
        ("root ::= thing # why\nthing ::= \"t\" |\n  \"u\"\n\n", "u", 1, true, true),
        ("root ::= item{2}\nitem ::= [a-z] \".\"", "a.b.", 4, true, true),
        ("root ::= \"(\" root \")\" | \"x\"", "((x))", 5, true, true),
        ("root ::= \"(\" root \")\" | \"x\"", "((x)x", 4, false, false),
        (JSON, r#"{"a": [1, -2.5e3, {"b\u00e9\n": null}], "c": true}"#, 50, true, false),
        (JSON, "{\"a\":\t1}", 5, false, false),
        (JSON, "{\"a\": 01}", 7, false, false),
    ];
    for &(source, text, taken, accepting, complete) in cases {
        assert_eq!(follow(source, text), (taken, accepting, complete), "{source}: {text}");
    }
}

/// What the mask says is what each token alone would say.
#[test]
fn masks_have_the_tokens_that_may_come() {
    let words = ["{\"", "\": ", "true", "tru", "nul", "é", "\"\"", "}}", "{}", "ab\"", "[1,2", "\u{1f600}\""];
    let trie = trie(&words);
    let check = |matcher: &mut Matcher, after: &str| {
        let mask: SimpleVob = matcher.mask(&trie).unwrap();
        for token in 0..u32::try_from(trie.vocab_size()).unwrap() {
            let alone = matcher.allows(i32::try_from(token).unwrap(), trie.token(token)).unwrap();
            assert_eq!(
                mask.is_allowed(token),
                alone,
                "{:?} after {after:?}",
                String::from_utf8_lossy(trie.token(token))
            );
        }
        mask
    };
    let mut json = matcher(JSON).unwrap();
    let mut said = String::new();
    for piece in ["{\"", "ab\"", ":", " ", "[1,2", ",", "tru", "e", "]", "}"] {
        let mask = check(&mut json, &said);
        assert!(mask.num_set() < trie.vocab_size());
        json.push_bytes(piece.as_bytes()).unwrap_or_else(|error| panic!("{piece} after {said}: {error}"));
        said.push_str(piece);
    }
    assert!(json.is_accepting());
    // In the middle of a character only its other bytes may come.
    let mut text = matcher("root ::= [é😀]+").unwrap();
    text.push_bytes(&[0xf0, 0x9f]).unwrap();
    let mask = check(&mut text, "half a character");
    assert_eq!((mask.num_set(), mask.is_allowed(0x98)), (1, true));
}

#[test]
fn tokens_can_be_named() {
    let trie = trie(&["a", "b"]);
    let mut thinks = matcher("root ::= <|think|> [a-z]* !<[5]> \"!\" <[7]>").unwrap();
    assert_eq!(thinks.mask(&trie).unwrap().num_set(), 0, "the token is beyond this vocabulary");
    assert_eq!(thinks.allows(299, b"<|think|>"), Ok(false));
    thinks.push_token(300, b"<|think|>").unwrap();
    thinks.push_bytes(b"xyz").unwrap();
    assert_eq!(thinks.allows(5, &[5]), Ok(false));
    let mask = thinks.mask(&trie).unwrap();
    assert_eq!((mask.is_allowed(5), mask.is_allowed(6), mask.num_set()), (false, true, trie.vocab_size() - 1));
    thinks.push_token(6, &[6]).unwrap();
    thinks.push_bytes(b"!").unwrap();
    assert_eq!(thinks.mask(&trie).unwrap().to_list(), [7]);
    thinks.push_token(7, &[7]).unwrap();
    assert!(thinks.is_complete());
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    let many = format!("root ::= {}\"a\"{}", "(".repeat(65), ")".repeat(65));
    let chain = (0..10_000).map(|rule| format!("r{rule} ::= r{}\n", rule + 1)).collect::<Vec<_>>().concat();
    let circle = format!("root ::= r0\n{chain}r10000 ::= r0");
    let repeated = format!("root ::= {}", "\"a\"{2000} ".repeat(101));
    let long = format!("root ::= \"{}\"", "a".repeat(300_000));
    let cases: &[(&str, &str)] = &[
        ("", "no rule 'root'"),
        ("a ::= \"b\"", "no rule 'root'"),
        ("root ::= a", "no rule 'a'"),
        ("root = \"a\"", "line 1 of the grammar: '::=' is expected"),
        ("root ::= \"a\"\n\nb ::= \"c", "line 3 of the grammar: the grammar ends too early"),
        ("root ::= [a", "ends too early"),
        ("root ::= (\"a\"", "')' is expected"),
        ("root ::= \"a\" )", "unexpected ')'"),
        ("root ::= *", "nothing stands before"),
        ("root ::= \"\\q\"", "unknown escape '\\q'"),
        ("root ::= \"\\xZZ\"", "2 hexadecimal digits"),
        ("root ::= \"\\ud800\"", "no such character"),
        ("root ::= \"a\"{x}", "a whole number"),
        ("root ::= \"a\"{99999999999999999999}", "a whole number"),
        ("root ::= \"a\"{2001}", "at most 2000"),
        ("root ::= \"a\"{3,2}", "less than its minimum"),
        ("root ::= \"a\"{3", "'}' is expected"),
        ("root ::= root \"a\" | \"b\"", "left recursion"),
        ("root ::= a\na ::= b? c\nb ::= \"x\"\nc ::= a", "left recursion"),
        ("root ::= <|other|>", "'<|other|>' is not one token"),
        ("root ::= <[99999999999]>", "no such token"),
        ("root ::= [^\\x00-\\U0010ffff]", "allows no text"),
        (&repeated, "larger than"),
        (&many, "more than 64 parentheses"),
        (&circle, "left recursion"),
        (&long, "262144 are allowed"),
    ];
    for (source, says) in cases {
        let begun = Instant::now();
        let error = matcher(source).map(|_| ()).unwrap_err();
        let shown = &source[..source.len().min(60)];
        assert!(error.contains(says), "{shown}: {error}");
        assert!(error.len() < 200, "{error}");
        assert!(begun.elapsed() < PATIENCE, "{shown}: {:?}", begun.elapsed());
    }
}

/// Grammars that take exponential time, memory or stack where nobody counts.
#[test]
fn hostile_grammars_end_soon() {
    let doubled = (0..60).map(|rule| format!("r{rule} ::= \"\" | r{0} r{0}\n", rule + 1));
    let doubling = doubled.collect::<Vec<_>>().concat();
    let optional = format!("root ::= {}\"b\"", "(\"a\" | \"aa\")? ".repeat(2000));
    let nested = format!("root ::= {}", "(\"a\"* \"a\"*)* ".repeat(200));
    let cases = [
        format!("root ::= r0\n{doubling}r60 ::= \"x\""),
        optional,
        nested,
        "root ::= (\"a\"{0,2000} \"a\"{0,2000}){0,2000}".to_owned(),
        "root ::= a a a a a a a a\na ::= \"x\" a a | \"\"".to_owned(),
        "root ::= .{0,2000} .{0,2000} .{0,2000} .{0,2000} \"!\"".to_owned(),
    ];
    let trie = trie(&["aaaa", "xxxx", "aaaaaaaa"]);
    for source in cases {
        let begun = Instant::now();
        let shown = &source[..source.len().min(60)];
        if let Ok(mut matcher) = matcher(&source) {
            for _ in 0..50 {
                if matcher.mask(&trie).is_err() || matcher.push_bytes(b"aaaa").is_err() {
                    break;
                }
                assert!(matcher.nodes.len() < 400_000, "{shown}: {} nodes", matcher.nodes.len());
            }
        }
        assert!(begun.elapsed() < PATIENCE, "{shown}: {:?}", begun.elapsed());
    }
}

/// An output of any length is followed in bounded memory.
#[test]
fn what_is_no_longer_needed_is_forgotten() {
    let mut counted = matcher("root ::= line*\nline ::= [a-z]{1,2000} \"(\" root \")\" \"\\n\"").unwrap();
    let trie = trie(&["abc", "(x"]);
    for round in 0..20_000 {
        counted.push_bytes(b"ab(").unwrap_or_else(|error| panic!("round {round}: {error}"));
        if round % 1000 == 0 {
            counted.mask(&trie).unwrap();
        }
    }
    for round in 0..20_000 {
        counted.push_bytes(b")\n").unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    assert!(counted.is_accepting() && !counted.is_complete());
    assert!(counted.nodes.len() + counted.states.len() < 2 * super::matcher::KEPT, "{}", counted.nodes.len());
}
