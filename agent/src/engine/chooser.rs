//! The next token of one sequence: what the sampler wants and the grammar allows.

use llguidance::toktrie::SimpleVob;

use super::budget::Budget;
use super::ffi::{Context, Model, Sampler};
use super::grammar::Constraint;
use super::request::Token;

/// Tokens that are tried at most while a lazy grammar refuses what would begin it wrongly.
const ATTEMPTS: usize = 64;

/// Why there is no next token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ChooseError {
    /// This sequence cannot go on; others can.
    Sequence(String),
    /// llama.cpp failed.
    Engine(String),
}

/// Sampler, grammar and budget of one sequence.
#[derive(Default)]
pub(super) struct Chooser {
    sampler: Sampler,
    constraint: Option<Constraint>,
    /// With the model, whose tokens it reads.
    budget: Option<(Budget, Model)>,
}

impl Chooser {
    pub(super) fn new(sampler: Sampler, constraint: Option<Constraint>) -> Self {
        Self { sampler, constraint, budget: None }
    }

    /// With a limit on reasoning.
    pub(super) fn within(self, budget: Budget, model: Model) -> Self {
        Self { budget: Some((budget, model)), ..self }
    }

    /// Tells the sampler of the end of a prompt; a grammar begins after it.
    pub(super) fn read_prompt(&mut self, prompt: &[Token]) -> Result<(), String> {
        let lookback = self.sampler.lookback().min(prompt.len());
        // What stands for a picture is no token.
        let mut text = prompt[prompt.len() - lookback..].iter().filter(|&&token| token >= 0);
        text.try_for_each(|&token| self.sampler.accept(token))
    }

    /// The next token after a row of the last batch; it is remembered.
    ///
    /// What the sampler would like is asked of the grammar first: most often it is allowed, and that is known in
    /// microseconds. Only else the mask of all tokens is computed, and the sampler chooses again among those. Either way
    /// a token's chance is its chance among the allowed ones.
    pub(super) fn choose(&mut self, context: &mut Context, row: i32) -> Result<Token, ChooseError> {
        let token = match self.forced()? {
            Some(token) => token,
            None => self.pick(context, row)?,
        };
        if let Some((budget, model)) = &mut self.budget {
            let mut piece = Vec::new();
            model.append_piece(token, true, &mut piece).map_err(ChooseError::Engine)?;
            budget.accept(&piece);
        }
        Ok(token)
    }

    /// What must come because the model has thought for long enough.
    fn forced(&mut self) -> Result<Option<Token>, ChooseError> {
        let Self { sampler, constraint, budget } = self;
        let Some((budget, _)) = budget else { return Ok(None) };
        let Some(token) = budget.forces() else { return Ok(None) };
        if let Some(constraint) = constraint {
            if !constraint.allows(token).map_err(ChooseError::Sequence)? {
                budget.give_up();
                return Ok(None);
            }
            constraint.accept(token).map_err(ChooseError::Sequence)?;
        }
        sampler.accept(token).map_err(ChooseError::Engine)?;
        Ok(Some(token))
    }

    fn pick(&mut self, context: &mut Context, row: i32) -> Result<Token, ChooseError> {
        let Self { sampler, constraint, budget: _ } = self;
        let mut mask = None;
        for _ in 0..ATTEMPTS {
            let allowed = mask.as_ref().map(SimpleVob::as_slice);
            let token = context.pick(sampler, row, allowed).map_err(ChooseError::Engine)?;
            let token = token.ok_or_else(nothing_left)?;
            if let Some(constraint) = constraint {
                if !constraint.allows(token).map_err(ChooseError::Sequence)? {
                    mask = Some(constraint.mask().map_err(ChooseError::Sequence)?);
                    continue;
                }
                constraint.accept(token).map_err(ChooseError::Sequence)?;
            }
            sampler.accept(token).map_err(ChooseError::Engine)?;
            return Ok(token);
        }
        Err(nothing_left())
    }

    /// The grammar allows nothing more.
    pub(super) fn is_complete(&self) -> bool {
        self.constraint.as_ref().is_some_and(Constraint::is_complete)
    }
}

fn nothing_left() -> ChooseError {
    ChooseError::Sequence("no token is left that the grammar and the logit bias allow".to_owned())
}
