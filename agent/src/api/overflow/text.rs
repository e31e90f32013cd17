//! Prompts that are one text: completions.

use altiplano_crds::model_deployment::OverflowPolicy;

use super::{Budget, MARK, Truncation};
use crate::api::error::ApiError;
use crate::api::params::Params;
use crate::api::state::ApiState;
use crate::engine::Token;

/// Prompts, each cut where it does not fit, and what was taken away. One that cannot be cut, or must not be, stays as
/// it is and is refused when it is submitted.
pub(crate) fn fit_prompts(
    state: &ApiState,
    params: &Params,
    prompts: Vec<Vec<Token>>,
) -> Result<(Vec<Vec<Token>>, Option<Truncation>), ApiError> {
    let facts = state.engine().model();
    let policy = params.overflow.unwrap_or(state.overflow());
    let budget = Budget::new(facts.max_tokens, params.max_tokens);
    let count = |tokens: &[Token]| u32::try_from(tokens.len()).unwrap_or(u32::MAX);
    let mut mark = Vec::new();
    let mut sum = None::<Truncation>;
    let mut fitted = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let tokens_before = count(&prompt);
        // An image cannot be cut, and what stands for one is below zero.
        let has_media = prompt.iter().any(|&token| token < 0);
        if tokens_before < budget.limit || policy == OverflowPolicy::Reject || has_media {
            fitted.push(prompt);
            continue;
        }
        if mark.is_empty() && policy == OverflowPolicy::DropMiddle {
            let tokens = state.engine().tokenize(MARK, false, false);
            mark = tokens.map_err(|error| ApiError::internal(error.to_string()))?;
        }
        let first = usize::from(facts.bos.is_some() && prompt.first().copied() == facts.bos);
        let Some(cut) = cut(policy, budget, &prompt, first, &mark) else {
            fitted.push(prompt);
            continue;
        };
        let tokens_after = count(&cut);
        let one = Truncation { policy, tokens_before, limit: budget.limit, tokens_after, dropped_messages: 0 };
        sum = Some(match sum {
            Some(sum) => sum.plus(&one),
            None => one,
        });
        fitted.push(cut);
    }
    Ok((fitted, sum))
}

/// A prompt that does not fit, cut; its `first` tokens stay. `None`: nothing can go.
fn cut(policy: OverflowPolicy, budget: Budget, prompt: &[Token], first: usize, mark: &[Token]) -> Option<Vec<Token>> {
    let excess = budget.excess(u32::try_from(prompt.len()).unwrap_or(u32::MAX));
    match policy {
        OverflowPolicy::Reject => None,
        OverflowPolicy::DropOldest => {
            let leaves = |gone: u32| (first + gone as usize) < prompt.len();
            let gone = [budget.in_steps(excess), excess].into_iter().find(|&gone| leaves(gone))?;
            Some([&prompt[..first], &prompt[first + gone as usize..]].concat())
        }
        OverflowPolicy::DropMiddle => {
            let (head, tail) = cut_middle(prompt.len(), excess as usize, mark.len())?;
            Some([&prompt[..head], mark, &prompt[prompt.len() - tail..]].concat())
        }
    }
}

/// How many tokens of head and of tail are left when `excess` and the mark's own tokens go from the middle of `length`;
/// `None`: so much is not there.
fn cut_middle(length: usize, excess: usize, mark: usize) -> Option<(usize, usize)> {
    let left = length.checked_sub(excess.checked_add(mark)?)?;
    (left >= 2).then(|| (left.div_ceil(2), left / 2))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_middle_goes() {
        assert_eq!(cut_middle(100, 50, 4), Some((23, 23)));
        assert_eq!(cut_middle(100, 51, 4), Some((23, 22)));
        assert_eq!(cut_middle(10, 8, 4), None);
        assert_eq!(cut_middle(10, usize::MAX, 4), None);
    }

    #[test]
    fn texts_are_cut_as_the_policy_says() {
        let prompt: Vec<Token> = (0..100).collect();
        // Room for 60 tokens, in steps of 10.
        let budget = Budget::new(80, None);
        assert_eq!(budget.target, 60);
        let cut = |policy| cut(policy, budget, &prompt, 1, &[-1, -2]);
        assert_eq!(cut(OverflowPolicy::Reject), None);
        assert_eq!(cut(OverflowPolicy::DropOldest).unwrap(), [&[0], &prompt[41..]].concat());
        let middle = [&prompt[..29], &[-1, -2], &prompt[71..]].concat();
        assert_eq!(cut(OverflowPolicy::DropMiddle).unwrap(), middle);
        assert_eq!(middle.len(), 60);
    }

    proptest! {
        #[test]
        fn what_is_left_fits(
            limit in 1u32..5000,
            more in 0usize..9000,
            max_tokens in proptest::option::of(0u32..6000),
            first in 0usize..2,
            mark in 0usize..20,
        ) {
            let budget = Budget::new(limit, max_tokens);
            let prompt: Vec<Token> = (0..).take(limit as usize + more).collect();
            let mark = vec![-1; mark];
            for policy in [OverflowPolicy::DropOldest, OverflowPolicy::DropMiddle] {
                let Some(left) = cut(policy, budget, &prompt, first, &mark) else {
                    prop_assert!((budget.target as usize) < 2 + mark.len() + first, "{:?} gives up", policy);
                    continue;
                };
                prop_assert!(left.len() <= (budget.target as usize).max(first + 1) && !left.is_empty());
                prop_assert_eq!(&left[..first], &prompt[..first]);
                prop_assert_eq!(left.last(), prompt.last());
                let own: Vec<_> = left.iter().filter(|token| **token >= 0).collect();
                prop_assert!(own.is_sorted_by(|left, right| left < right), "order is kept");
            }
        }
    }
}
